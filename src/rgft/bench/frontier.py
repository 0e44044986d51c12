"""The frontier: which methods nothing beats at their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rgft.bench.figures import is_lower_better
from rgft.bench.finals import Finals, Kind, final_results, metric_of
from rgft.bench.group import Group, canonical
from rgft.errors import DataError

Cost = Literal["flops", "seconds"]
#: Runs end within a step of their budget: costs that differ by less are the same.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Point:
    """A contender's mean over seeds.

    Attributes:
        label: of the contender.
        kind: what it is, whatever its label and budget.
        cost: FLOPs as a share of full fine-tuning's, or seconds.
        quality: the metric's mean.
        error: its standard error; None with one seed.
        seeds: how many.
        is_on_frontier: no other is better at no more cost (within `TOLERANCE`).
        acted: whether it was anything but full fine-tuning under another name.
    """

    label: str
    kind: Kind
    cost: float
    quality: float
    error: float | None
    seeds: int
    is_on_frontier: bool
    acted: bool


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """A task's contenders.

    Attributes:
        metric: what `quality` is.
        points: the cheapest first.
        left_out: contenders that are not among them, by label and budget, and why.
    """

    metric: str
    points: Sequence[Point]
    left_out: Mapping[str, str]


def frontiers(folder: Path, *, metric: str, against: Cost = "flops") -> dict[Group, Frontier]:
    """All contenders of each task; fixed cuts are left out.

    Args:
        folder: of result files.
        metric: of the test split; `SCORE`: each task's own.
        against: what they cost. Seconds are compared of runs with nothing else beside them, on one machine: of several
            that on which most contenders of a task were run.

    Raises:
        DataError: there are no results, or the metric was measured on no task.
    """
    found = {
        group: _frontier(contenders, metric_of(group, metric), against)
        for group, contenders in final_results(folder).items()
        if not group.fixes_cuts
    }
    if not any(frontier.points for frontier in found.values()):
        raise DataError(
            f"{folder}: expected results with the metric {metric!r}, to be held against {against}; found none"
        )
    return found


def _frontier(contenders: Sequence[Finals], metric: str, against: Cost) -> Frontier:
    left_out = {_name(finals): f"{metric} {lack}" for finals in contenders if (lack := finals.lacks(metric))}
    kept = [finals for finals in contenders if _name(finals) not in left_out]
    if against == "seconds":
        kept, missing = _on_one_machine(kept)
        left_out |= missing
    return Frontier(metric=metric, points=_points(kept, metric, against), left_out=left_out)


def _name(finals: Finals) -> str:
    return f"{finals.label} at {finals.budget:g}"


def _on_one_machine(contenders: Sequence[Finals]) -> tuple[list[Finals], dict[str, str]]:
    """Contenders whose seconds can be compared, by the runs that were made alone and on the usual machine."""
    counted = Counter(m for finals in contenders for m in {_machine(r) for r in finals.by_seed.values() if _alone(r)})
    machine = max(counted, key=lambda name: (counted[name], name), default="")
    kept: list[Finals] = []
    left_out: dict[str, str] = {}
    for finals in contenders:
        alone = {seed: result for seed, result in finals.by_seed.items() if _alone(result)}
        there = {seed: result for seed, result in alone.items() if _machine(result) == machine}
        if there:
            kept.append(replace(finals, by_seed=there))
        else:
            left_out[_name(finals)] = "run on another machine" if alone else "run with others beside it"
    return kept, left_out


def _alone(result: Mapping[str, Any]) -> bool:
    """Whether nothing ran beside; the bench made one run at a time before its results said how many."""
    return result.get("jobs", 1) == 1


def _machine(result: Mapping[str, Any]) -> str:
    """What computed, as far as a result says."""
    environment = result.get("environment", {})
    torch = environment.get("torch", {})
    return canonical(
        [result.get("device", "cpu"), environment.get("cpu"), environment.get("accelerators"), torch.get("threads")]
    )


def _cost(finals: Finals, against: Cost) -> float:
    if against == "flops":
        return finals.flops
    return mean(float(result["seconds"]) for result in finals.by_seed.values())


def _points(contenders: Sequence[Finals], metric: str, against: Cost) -> list[Point]:
    sign = -1.0 if is_lower_better(metric) else 1.0
    values = [list(finals.metric(metric).values()) for finals in contenders]
    costs = [_cost(finals, against) for finals in contenders]
    qualities = [mean(of_seeds) for of_seeds in values]

    def is_beaten(index: int) -> bool:
        return any(
            costs[other] <= (1.0 + TOLERANCE) * costs[index] and sign * qualities[other] > sign * qualities[index]
            for other in range(len(contenders))
        )

    points = [
        Point(
            label=finals.label, kind=finals.kind, cost=costs[index], quality=qualities[index],
            error=stdev(values[index]) / len(values[index]) ** 0.5 if len(values[index]) > 1 else None,
            seeds=len(values[index]), is_on_frontier=not is_beaten(index), acted=finals.acted,
        )
        for index, finals in enumerate(contenders)
    ]  # fmt: skip
    return sorted(points, key=lambda point: (point.cost, point.label))
