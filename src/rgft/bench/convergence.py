"""What it takes to reach a target: FLOPs, epochs and seconds to the first evaluation that is as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rgft.bench.figures import is_lower_better
from rgft.bench.finals import Finals, Group, final_results
from rgft.errors import DataError

#: Of each run, its evaluations in order.
_Curves = list[list[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a contender's runs took to a target; means over those that got there.

    Attributes:
        label: of the contender.
        budget: that it was given.
        seeds: runs whose quality was evaluated along the way.
        reached: how many of them got there.
        fraction_of_full: FLOPs, as a share of full fine-tuning's; None: no run got there. So with the others.
        epochs: of examples.
        seconds: of training.
        best: the best that any evaluation showed, in the mean over seeds.
    """

    label: str
    budget: float
    seeds: int
    reached: int
    fraction_of_full: float | None
    epochs: float | None
    seconds: float | None
    best: float


def first_reaching(points: Sequence[Mapping[str, Any]], metric: str, target: float) -> Mapping[str, Any] | None:
    """The first evaluation of a run that is at least as good as the target; None: none is.

    Between two evaluations nothing is known: what is found is an upper bound, as coarse as they lie apart.
    """
    sign = -1.0 if is_lower_better(metric) else 1.0
    with_metric = (point for point in points if metric in point["metrics"])
    return next((point for point in with_metric if sign * point["metrics"][metric] >= sign * target), None)


def reached(folder: Path, *, metric: str, target: float | None, of: str | None = None) -> dict[Group, list[Reached]]:
    """What all contenders with evaluations along the way took to a target, the cheapest first.

    Args:
        folder: of result files.
        metric: of the validation split.
        target: a value; None: what the contender `of` ends with, in the mean over its seeds.
        of: label of that contender.

    Raises:
        DataError: no run was evaluated along the way, the metric was not measured, or there is no such contender.
    """
    if (target is None) == (of is None):
        raise DataError("expected a target or the label of a contender whose end is the target; give one of the two")
    found: dict[Group, list[Reached]] = {}
    for group, contenders in final_results(folder).items():
        curves = [(finals, points) for finals in contenders if (points := _curves(finals, metric))]
        if curves:
            value = _end_of(of, curves, metric) if target is None else target
            if value is not None:
                rows = [_reached(finals, points, metric, value) for finals, points in curves]
                found[group] = sorted(
                    rows, key=lambda row: (row.fraction_of_full is None, row.fraction_of_full, row.label)
                )
    if not found:
        raise DataError(
            f"{folder}: expected final runs with {metric!r} along the way"
            + (f", of {of!r} too" if of else "")
            + '; found none. Give the experiment {"evaluate": {"at": [0.25, 0.5, 0.75]}}'
        )
    return found


def _curves(finals: Finals, metric: str) -> _Curves:
    curves = [result.get("measures", {}).get("along", []) for result in finals.by_seed.values()]
    return [points for points in curves if isinstance(points, list) and any(metric in p["metrics"] for p in points)]


def _end_of(label: str | None, curves: Sequence[tuple[Finals, _Curves]], metric: str) -> float | None:
    ends = [
        points[-1]["metrics"][metric]
        for finals, of_seeds in curves
        if finals.label == label
        for points in of_seeds
        if metric in points[-1]["metrics"]
    ]
    return mean(ends) if ends else None


def _reached(finals: Finals, curves: _Curves, metric: str, target: float) -> Reached:
    points = [point for curve in curves if (point := first_reaching(curve, metric, target)) is not None]
    choose = min if is_lower_better(metric) else max

    def average(key: str) -> float | None:
        return mean(point[key] for point in points) if points else None

    return Reached(
        label=finals.label, budget=finals.budget, seeds=len(curves), reached=len(points),
        fraction_of_full=average("fraction_of_full"), epochs=average("epochs"), seconds=average("seconds"),
        best=mean(choose(p["metrics"][metric] for p in curve if metric in p["metrics"]) for curve in curves),
    )  # fmt: skip
