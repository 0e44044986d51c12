"""The frontier: which methods nothing beats at their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from rgft.bench.costs import Cost, circumstances, unsound
from rgft.bench.figures import is_lower_better
from rgft.bench.finals import Finals, Kind, final_results, metric_of, of_another_choice, without_superseded
from rgft.bench.group import Group
from rgft.errors import DataError

#: Runs end within a step of their budget: costs that differ by less are the same.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Point:
    """A contender's mean over seeds.

    Attributes:
        label: of the contender.
        kind: what it is, whatever its label and budget.
        cost: in the unit of what it is held against: see `figures.COSTS`.
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
    """All contenders of each task; fixed cuts are left out, and what `of_another_choice` names.

    Args:
        folder: of result files.
        metric: of the test split; `SCORE`: each task's own.
        against: what they cost. Seconds, and energy with them, are compared of runs with nothing else beside them, on
            one machine: of several that on which most contenders of a task were run. So they are as a metric.

    Raises:
        DataError: there are no results, or the metric was measured on no task.
    """
    results = {group: contenders for group, contenders in final_results(folder).items() if not group.fixes_cuts}
    found = {
        group: _frontier(without_superseded(contenders), metric_of(group, metric), against)
        for group, contenders in results.items()
        if group not in of_another_choice(results, metric)
    }
    if not any(frontier.points for frontier in found.values()):
        reasons = sorted({why for frontier in found.values() for why in frontier.left_out.values()})
        raise DataError(
            f"{folder}: expected results with the metric {metric!r}, to be held against {against}; found none: "
            + "; ".join(reasons)
        )
    return found


def _frontier(contenders: Sequence[Finals], metric: str, against: Cost) -> Frontier:
    left_out = {
        _name(finals): f"{name} {lack}"
        for finals in contenders
        for name in (against, metric)
        if (lack := finals.lacks(name))
    }
    kept = [finals for finals in contenders if _name(finals) not in left_out]
    for cost in (metric, against):
        kept, missing = _made_alike(kept, cost)
        left_out |= missing
    return Frontier(metric=metric, points=_points(kept, metric, against), left_out=left_out)


def _name(finals: Finals) -> str:
    return f"{finals.label} at {finals.budget:g}"


def _made_alike(contenders: Sequence[Finals], cost: str) -> tuple[list[Finals], dict[str, str]]:
    """Contenders whose costs can be compared, by the runs that say something of it and were made as most were."""
    sound = [
        (finals, {s: finals.by_seed[s] for s in finals.metric(cost) if not unsound(finals.by_seed[s], cost)})
        for finals in contenders
    ]
    counted = Counter(how for _, runs in sound for how in {circumstances(result, cost) for result in runs.values()})
    usual = max(counted, key=lambda how: (counted[how], how), default="")
    kept: list[Finals] = []
    left_out: dict[str, str] = {}
    for finals, runs in sound:
        if alike := {seed: result for seed, result in runs.items() if circumstances(result, cost) == usual}:
            kept.append(replace(finals, by_seed=alike))
        else:
            left_out[_name(finals)] = "run on another machine" if runs else _why(finals, cost)
    return kept, left_out


def _why(finals: Finals, cost: str) -> str:
    return ", ".join(sorted({unsound(result, cost) for result in map(finals.by_seed.__getitem__, finals.metric(cost))}))


def _points(contenders: Sequence[Finals], metric: str, against: Cost) -> list[Point]:
    sign = -1.0 if is_lower_better(metric) else 1.0
    values = [list(finals.metric(metric).values()) for finals in contenders]
    costs = [mean(finals.metric(against).values()) for finals in contenders]
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
