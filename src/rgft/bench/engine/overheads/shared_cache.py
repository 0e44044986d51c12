"""Several trials on one activation cache, beside one trial without it and one full fine-tuning."""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

import torch
from torch.utils.data import default_collate

from rgft.bench.engine.cells import EngineCell, plan_of
from rgft.bench.engine.overheads.figures import Measured, Target
from rgft.bench.engine.overheads.sizes import Sizes
from rgft.bench.engine.stepping import moved
from rgft.bench.engine.workloads import EngineWorkload, Examples
from rgft.config import Config
from rgft.cost.rates import synchronise
from rgft.guide import Guide
from rgft.optimizer import adamw
from rgft.partition import partition

TRIALS, EPOCHS = 8, 3
#: Of the layers are frozen in a trial.
FROZEN = 0.5
#: Learning rates of the trials.
RATES = tuple(1e-5 * 2**trial for trial in range(TRIALS))


def shared_cache(sizes: Sizes, device: torch.device) -> Measured:
    """Seconds of a sweep: eight trials with half of the layers frozen, three epochs each, and what they share.

    A trial is all that a run does after its model is loaded: costs traced, the cache's fingerprint taken, its epochs
    trained. The first trial fills the cache.

    Figures: `trials_of_one_without`, all trials in seconds, as a multiple of one without a cache; `trials_of_full`,
    of one full fine-tuning; each the median of the repeats; `first_trial_seconds`, `later_trial_seconds`,
    `trial_without_seconds`, `full_seconds`.
    """
    workload, repeats = sizes.encoder, sizes.sweeps
    seconds: dict[str, list[float]] = {"full": [], "without": [], "first": [], "later": [], "trials": []}
    _trial(workload, sizes.sweep_batches, device, lr=RATES[0], cache=None, is_full=False)  # warm-up
    for _ in range(repeats):
        seconds["full"].append(_trial(workload, sizes.sweep_batches, device, lr=RATES[0], cache=None, is_full=True))
        seconds["without"].append(_trial(workload, sizes.sweep_batches, device, lr=RATES[0], cache=None, is_full=False))
        with tempfile.TemporaryDirectory() as folder:
            trials = [_trial(workload, sizes.sweep_batches, device, lr=lr, cache=folder, is_full=False) for lr in RATES]
        seconds["first"].append(trials[0])
        seconds["later"].append(median(trials[1:]))
        seconds["trials"].append(sum(trials))

    def ratio(name: str) -> float:
        return median(a / b for a, b in zip(seconds["trials"], seconds[name], strict=True))

    return Measured(
        config={
            "model": workload.name, "rows": workload.rows, "batches": sizes.sweep_batches, "epochs": EPOCHS,
            "trials": TRIALS, "frozen_fraction": FROZEN, "cache": "disk",
        },
        figures={
            "trials_of_one_without": ratio("without"), "trials_of_full": ratio("full"),
            "first_trial_seconds": median(seconds["first"]), "later_trial_seconds": median(seconds["later"]),
            "trial_without_seconds": median(seconds["without"]), "full_seconds": median(seconds["full"]),
        },
        targets=(Target(figure="trials_of_one_without", at_most=6.5), Target(figure="trials_of_full", at_most=4.5)),
        warm_up=1, repeats=repeats,
    )  # fmt: skip


def _trial(
    workload: EngineWorkload, batches: int, device: torch.device, *, lr: float, cache: str | None, is_full: bool
) -> float:
    """Seconds of one run."""
    torch.manual_seed(0)
    model = workload.build().to(device, workload.dtype).train()
    examples = Examples(workload, model, workload.rows * batches)
    plan = plan_of(EngineCell(kind="rgft", frozen_fraction=FROZEN), partition(model))
    execution: dict[str, Any] = {"cache": "none"} if cache is None else {"cache": "disk", "cache_dir": cache}
    synchronise(device)
    started = time.perf_counter()
    config = Config(
        preset="full", policy=None if is_full else {"name": "static", "plan": plan.to_dict()}, execution=execution
    )
    with Guide(model, config, loss=lambda m, batch: m(**moved(batch, device)).loss) as guide:
        optimizer = adamw(guide.param_groups(lr=lr, weight_decay=0.01), lr=lr)
        for batch in guide.batches(examples, batch_size=workload.rows, collate_fn=default_collate, epochs=EPOCHS):
            guide.loss(batch).backward()
            guide.step(optimizer)
            optimizer.zero_grad()
    synchronise(device)
    return time.perf_counter() - started
