"""Results of final runs, as they are compared: by task and budget, contender and seed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rgft.bench.fingerprint import require_equal
from rgft.bench.methods import METHODS
from rgft.bench.tasks import TASKS
from rgft.errors import DataError

log = logging.getLogger("rgft")

#: Metrics of which less is better.
LOWER_IS_BETTER = frozenset({"loss", "calibration_error", "perplexity", "mse", "top1_error"})


@dataclass(frozen=True, kw_only=True)
class Group:
    """A comparison: runs on one task, data and length.

    Attributes:
        task: its name.
        title: in words.
        fixes_cuts: whether these are cuts fixed by hand, beside RGFT's own.
        variant: which of the task's tasks it is, where it has several.
    """

    task: str
    title: str
    fixes_cuts: bool
    variant: str = ""

    @property
    def source(self) -> str:
        """Where the examples come from: tasks with one source are not independent."""
        source = TASKS[self.task].source
        return f"{source}: {self.variant}" if self.variant else source

    @property
    def metric(self) -> str:
        """What tables show beside the loss."""
        return TASKS[self.task].metric

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Group:
        task, run = result["task"], result["run"]
        name = task.get("name", "rotten_tomatoes")
        epochs = "one epoch" if run["epochs"] == 1 else f"{run['epochs']:g} epochs"
        variant = TASKS[name].variant(task)
        title = f"{TASKS[name].title} ({variant})" if variant else TASKS[name].title
        size = f"{task['train_size']:,}" if task.get("train_size") is not None else "all"
        cut = f" of {task['tokens']} tokens" if "tokens" in task else ""
        return cls(
            task=name, title=f"{title}, {size} examples{cut}, {epochs}", fixes_cuts=result["method"] == "cut",
            variant=variant,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finals:
    """A contender's final runs.

    Attributes:
        label: its row in tables, without its budget; the contender's, and of an earlier revision that.
        method: name in `methods.METHODS`.
        budget: share of full fine-tuning's FLOPs that it was given.
        is_plain: whether the method ran with its own settings.
        is_current: whether it is of the method's revision of now; the label of another says which.
        by_seed: results.
        diverged: seeds whose runs did, and have no figures.
    """

    label: str
    method: str
    budget: float
    is_plain: bool
    is_current: bool
    by_seed: Mapping[int, Mapping[str, Any]]
    diverged: tuple[int, ...] = ()

    @property
    def seeds(self) -> str:
        """How many there are, or how many of them diverged."""
        count = len(self.by_seed) + len(self.diverged)
        return f"{len(self.diverged)} of {count} seeds diverged" if self.diverged else f"{count} seeds"

    def metric(self, name: str) -> dict[int, float]:
        """Seed → value on the test split.

        Raises:
            DataError: it was not measured.
        """
        try:
            return {seed: float(result["metrics"]["test"][name]) for seed, result in self.by_seed.items()}
        except KeyError as error:
            known = sorted({key for result in self.by_seed.values() for key in result["metrics"]["test"]})
            raise DataError(f"{self.label}: expected the metric {name!r} in its results, found {known}") from error

    @property
    def flops(self) -> float:
        """What it spent, as a share of full fine-tuning, in the mean."""
        return mean(float(result["ledger"]["flops"]["fraction_of_full"]) for result in self.by_seed.values())

    @property
    def seconds(self) -> float:
        """Of training, in the mean."""
        return mean(float(result["seconds"]) for result in self.by_seed.values())

    @property
    def steps(self) -> float:
        return mean(result["steps"] for result in self.by_seed.values())

    @property
    def rates(self) -> str:
        """Learning rates of the runs: chosen before them, or found in them."""
        rates = sorted({float(result.get("found_lr", result["lr"])) for result in self.by_seed.values()})
        return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


def final_results(folder: Path) -> dict[Group, list[Finals]]:
    """All final runs below `folder`.

    Raises:
        DataError: there are none, a file is damaged, a contender has two with one seed, or runs that are compared were
            measured on different data.
    """
    found: dict[Group, dict[tuple[str, int], dict[int, Any]]] = {}
    first: dict[tuple[Group, int], tuple[Path, Any]] = {}
    for path in sorted(folder.glob("**/*--final--*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: expected a result in JSON, found a damaged file; delete it") from error
        group = Group.of(result)
        if "data" in result:
            other, data = first.setdefault((group, result["seed"]), (path, result["data"]))
            require_equal(result["data"], data, str(path), f"{other}, beside which it would stand")
        of_contender = found.setdefault(group, {}).setdefault((result["contender"], result.get("revision", 1)), {})
        if result["seed"] in of_contender:
            rate = of_contender[result["seed"]]["lr"]
            raise DataError(
                f"{path}: expected one final run of {result['contender']!r} with seed {result['seed']}, found another "
                f"at the rate {rate:g}; delete the one that is out of date"
            )
        of_contender[result["seed"]] = result
    if not found:
        raise DataError(f"{folder}: expected results of final runs, found none; run the experiment first")
    groups = {
        group: [_finals(label, revision, results) for (label, revision), results in contenders.items()]
        for group, contenders in sorted(found.items(), key=lambda item: (item[0].title, item[0].fixes_cuts))
    }
    return {group: finals + (_beside(group, groups) if group.fixes_cuts else []) for group, finals in groups.items()}


def _finals(contender: str, revision: int, results: Mapping[int, Mapping[str, Any]]) -> Finals:
    first = next(iter(results.values()))
    known = METHODS.get(first["method"])
    is_current = known is not None and known.revision == revision
    label = contender.removesuffix(f"-{first['budget']:g}")
    finals = Finals(
        label=label if is_current else f"{label}, revision {revision}", method=first["method"], budget=first["budget"],
        is_plain=not first.get("settings"), is_current=is_current,
        by_seed={seed: result for seed, result in results.items() if "diverged" not in result},
        diverged=tuple(seed for seed, result in results.items() if "diverged" in result),
    )  # fmt: skip
    if finals.diverged:
        log.warning("%s: %s, and are in no mean", contender, finals.seeds)
    return finals


def _beside(cuts: Group, groups: Mapping[Group, list[Finals]]) -> list[Finals]:
    """RGFT's own choice, at the budgets of the fixed cuts."""
    budgets = {finals.budget for finals in groups[cuts]}
    return [
        finals
        for group, others in groups.items() if group.title == cuts.title and not group.fixes_cuts
        for finals in others if finals.method == "rgft" and finals.is_plain and finals.budget in budgets
    ]  # fmt: skip
