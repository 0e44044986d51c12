"""Holds the bench's rows for full fine-tuning and LoRA against plain Transformers and PEFT code on the same batches.

    python benchmarks/baselines/check.py run       # what is not done yet, or stale; some ten minutes on two cores
    python benchmarks/baselines/check.py table     # what is stale is named below it and counts for nothing

Each result file has the losses before every step of three runs: the plain loop (`plain_training.py`), ours with the
same schedule over the number of steps, and the bench's row, whose schedule goes by FLOPs spent. The first two should
be equal to the last bit or to rounding; the third should agree within the noise of seeds. A result is stale when the
method's revision or the settings that it was made with are not those of now.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import plain_training
import torch

from rgft.batches import BatchStream, Subset
from rgft.bench.methods import method
from rgft.bench.results import read_result, write_result
from rgft.bench.runner import full_fine_tuning_flops
from rgft.bench.statistics import compare
from rgft.bench.tasks import bench_task
from rgft.config import Config
from rgft.errors import DataError, RGFTError
from rgft.run import Run, Settings, StepReport
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import model_folder
from rgft.telemetry.environment import environment

RESULTS = Path("benchmarks/results/plain_baselines")
SCHEMA = "rgft.plain_baseline/1"
SEEDS = (0, 1, 2)
TASKS: dict[str, dict[str, Any]] = {
    "rotten_tomatoes": {"name": "rotten_tomatoes", "train_size": 320},
    "bbc": {"name": "bbc", "train_size": 320, "tokens": 32},
}
RATES = {"full": 2e-4, "lora": 1e-3}
TEST_SIZE, RANK, HEAD_MULTIPLIER, MAX_GRAD_NORM = 200, 8, 10.0, 1.0
RUN: dict[str, Any] = {"epochs": 1.0, "batch_size": 16, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1}

#: What a result has in any case, and of which kind.
KEYS = {"task": dict, "method": str, "seed": int, "runs": dict, "plain_against": dict}


def prepared(task: str, seed: int) -> PreparedTask:
    made = bench_task(TASKS[task], seed=seed)
    assert made.test is not None
    drawn = random.Random("plain baselines").sample(range(len(made.test)), TEST_SIZE)  # splits go by label
    made.test = Subset(made.test, drawn)
    return made


def shared_settings(name: str) -> dict[str, Any]:
    """What the bench's experiments give to a method."""
    return {"classifier_lr_multiplier": HEAD_MULTIPLIER, **method(name).instead}


def identity_of(task: str, name: str, seed: int) -> dict[str, Any]:
    """What decides the runs of a result."""
    return {
        "schema": SCHEMA, "task": TASKS[task], "method": name, "seed": seed, "run": RUN, "lr": RATES[name],
        "test_examples": TEST_SIZE, "revision": method(name).revision,
        "head_lr_multiplier": shared_settings(name)["classifier_lr_multiplier"], "max_grad_norm": MAX_GRAD_NORM,
        **({"rank": RANK} if name == "lora" else {}),
    }  # fmt: skip


def stale(result: Mapping[str, Any], task: str, name: str, seed: int) -> str:
    """What a result was made with that is another now, in words; empty: nothing."""
    return ", ".join(
        f"{key} {result.get(key)} there, {value} now"
        for key, value in identity_of(task, name, seed).items()
        if result.get(key) != value
    )


def ours(name: str, task: PreparedTask, *, seed: int, budget: float | None) -> dict[str, Any]:
    """A run as the bench makes it; without a budget its schedule goes by steps."""
    chosen, losses = method(name), list[float]()
    config = Config.from_dict({**chosen.config, **shared_settings(name), "budget": budget, "seed": seed})
    settings = Settings(lr=RATES[name], **RUN)
    full = full_fine_tuning_flops(task, settings, seed=seed) if chosen.changes_model else None
    torch.manual_seed(seed)
    task.model, task.loss = chosen.prepare(task.model, {"rank": RANK}), chosen.loss_of(task.loss, {})

    def note(report: StepReport) -> None:
        losses.append(report.loss)

    run = Run(task, config, settings, full_flops=full, observers=[note])
    try:
        run.prepare()
        run.train()
        assert task.test is not None
        metrics = run.evaluate(task.test)
        fraction = run.guide.summary()["flops"]["fraction_of_full"]
    finally:
        run.close()
    return {
        "losses": losses, "accuracy": metrics["accuracy"], "loss": metrics["loss"], "fraction_of_full": fraction,
        "seconds": sum(run.guide.ledger.seconds[part] for part in ("step", "data")),
    }  # fmt: skip


def job_of(name: str, task: PreparedTask, *, seed: int) -> dict[str, Any]:
    """The same data, batches and settings as plain values."""
    assert task.test is not None
    stream = BatchStream(
        task.train, batch_size=RUN["batch_size"], collate_fn=task.collate, epochs=RUN["epochs"], seed=seed
    )
    return {
        "method": name, "model_folder": str(model_folder()), "classes": len(task.label_names), "seed": seed,
        "train": list(task.train), "test": [task.test[i] for i in range(len(task.test))],  # pyright: ignore
        "batches": list(stream.indices()), "lr": RATES[name],
        "head_lr_multiplier": shared_settings(name)["classifier_lr_multiplier"],
        "weight_decay": RUN["weight_decay"], "warmup": RUN["warmup"], "max_grad_norm": MAX_GRAD_NORM, "rank": RANK,
    }  # fmt: skip


def differences(one: list[float], other: list[float]) -> dict[str, Any]:
    """Of two runs' losses: in how many first steps they are equal, and how far apart they get."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=False)]
    equal = next((place for place, gap in enumerate(gaps) if gap), len(gaps))
    return {"steps": [len(one), len(other)], "equal_first_steps": equal, "largest_gap": max(gaps)}


def check(task: str, name: str, seed: int) -> dict[str, Any]:
    runs = {
        "plain": plain_training.train(job_of(name, prepared(task, seed), seed=seed)),
        "ours_by_steps": ours(name, prepared(task, seed), seed=seed, budget=None),
        "row": ours(name, prepared(task, seed), seed=seed, budget=1.0),
    }
    return {
        **identity_of(task, name, seed), "runs": runs,
        "plain_against": {
            other: differences(runs["plain"]["losses"], runs[other]["losses"]) for other in ("ours_by_steps", "row")
        },
        "environment": environment(),
    }  # fmt: skip


def cells(folder: Path) -> Iterator[tuple[Path, str, str, int]]:
    for seed in SEEDS:
        for task in TASKS:
            for name in RATES:
                yield folder / f"{task}--{name}--seed{seed}.json", task, name, seed


def stored(folder: Path) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """The results of now, and why each of the others is stale."""
    known = {path: (task, name, seed) for path, task, name, seed in cells(folder)}
    results: list[dict[str, Any]] = []
    others: dict[Path, str] = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path, KEYS)
        if why := stale(result, *known[path]) if path in known else "none of the runs of now":
            others[path] = why
        else:
            results.append(result)
    return results, others


def pending(folder: Path) -> Iterator[tuple[Path, str, str, int]]:
    """Runs that have no result, or a stale one."""
    _, others = stored(folder)
    for cell in cells(folder):
        if not cell[0].exists() or cell[0] in others:
            yield cell


def table(folder: Path) -> str:
    """A Markdown table of the results of now; below it the stale ones, with what was another then.

    Raises:
        DataError: a result is damaged, or none is of now.
    """
    results, others = stored(folder)
    named = [f"- {path.name} is stale, and not counted: {why}" for path, why in others.items()]
    if not results:
        raise DataError("\n".join([f"{folder}: expected results of now, found none; make them by `run`", *named]))
    lines = [
        "| | seeds | equal first steps (of) | largest gap of a loss, ours by steps | plain loss | row's loss lower by "
        "| row's accuracy higher by | row's seconds of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(r["task"]["name"], r["method"]) for r in results}):
        own = [r for r in results if (r["task"]["name"], r["method"]) == key]
        same = [r["plain_against"]["ours_by_steps"] for r in own]
        seconds = sum(r["runs"]["row"]["seconds"] for r in own) / sum(r["runs"]["plain"]["seconds"] for r in own)
        cells = [
            f"{key[0]}, {key[1]}", str(len(own)),
            f"{min(s['equal_first_steps'] for s in same)} ({same[0]['steps'][0]})",
            f"{max(s['largest_gap'] for s in same):.1e}",
            f"{sum(r['runs']['plain']['loss'] for r in own) / len(own):.4f}",
        ]  # fmt: skip
        for metric in ("loss", "accuracy"):
            by_seed = [{r["seed"]: r["runs"][kind][metric] for r in own} for kind in ("row", "plain")]
            if len(own) < 2:
                cells.append("one seed")
                continue
            is_share = metric == "accuracy"
            found = compare(by_seed[0], by_seed[1], higher_is_better=is_share, examples=TEST_SIZE if is_share else None)
            cells.append(f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
        lines.append("| " + " | ".join([*cells, f"{seconds:.2f}"]) + " |")
    return "\n".join([*lines, *(["", *named, "`run` makes these anew."] if named else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(table(arguments.results))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    for path, task, name, seed in pending(arguments.results):
        result = check(task, name, seed)
        write_result(path, result)
        print(path, result["plain_against"])


if __name__ == "__main__":
    try:
        main()
    except RGFTError as error:
        raise SystemExit(str(error)) from error
