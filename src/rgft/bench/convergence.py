"""What it takes to reach a target: FLOPs, steps, epochs and seconds to the first evaluation that is as good.

A run that does not get there took more than it had, and nobody knows how much more: it is censored. Means over the
others would flatter whoever gets there now and then, so that a contender's figure is the median over all of its runs,
those that are censored above all others. Two contenders are compared by seed, with what is known of censored runs:
that they took more than they had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from rgft.bench.costs import doubt, unsound
from rgft.bench.figures import is_lower_better
from rgft.bench.finals import Finals, Group, final_results
from rgft.bench.statistics import Ratio, compare_logarithms
from rgft.errors import DataError

#: What is counted to a target → where evaluations say it.
_COUNTED: Mapping[str, str] = {
    "flops": "fraction_of_full", "steps": "step", "epochs": "epochs", "seconds": "seconds",
}  # fmt: skip

_Point = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a contender's runs took to a target, as a multiple of what a baseline's did with the same seeds.

    Attributes:
        ratio: see `Ratio`; None: nothing can be said.
        bound: of what the ratio is one: "at most" where baseline's runs did not get there, as they took more than they
            had; "at least" where the method's did not; empty: all did. The interval is the bound's, too, and what it
            decides is on its own side only.
        why: there is no ratio, in words.
    """

    ratio: Ratio | None = None
    bound: Literal["", "at most", "at least"] = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a contender's runs took to a target.

    Attributes:
        median: over all runs, those that did not get there above all others; None: half of them did not.
        at_least: the median is no less, whatever those that did not get there would have taken.
        low, high: of all runs; None: a run did not get there, in `low` none did.
        doubt: why it says nothing, in words; empty: it does.
        against: beside a baseline; None: there is none, or it is this one.
    """

    median: float | None
    at_least: float
    low: float | None
    high: float | None
    doubt: str = ""
    against: Against | None = None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a contender's runs took to a target.

    Attributes:
        label: of the contender.
        budget: that it was given.
        target: that was to be reached.
        seeds: runs whose quality was evaluated along the way, and those that diverged.
        reached: how many of them got there.
        flops: as a share of full fine-tuning's.
        steps: of the optimizer.
        epochs: of examples.
        seconds: of training.
        best: the best that any evaluation showed, in the mean over seeds.
    """

    label: str
    budget: float
    target: float
    seeds: int
    reached: int
    flops: Taken
    steps: Taken
    epochs: Taken
    seconds: Taken
    best: float | None


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """A contender's runs, by seed.

    Attributes:
        finals: of which these are some.
        curves: evaluations along the way, in order, of runs that were asked for the metric, though some may leave it
            undefined; of runs that diverged there are none.
    """

    finals: Finals
    curves: Mapping[int, Sequence[_Point]]

    @classmethod
    def of(cls, finals: Finals, metric: str) -> _Runs:
        curves = {seed: _along(result, metric) for seed, result in finals.by_seed.items()}
        curves = {seed: points for seed, points in curves.items() if points}
        return cls(finals=finals, curves={**curves, **{seed: [] for seed in finals.diverged if curves}})

    @property
    def ran(self) -> list[Sequence[_Point]]:
        return [points for points in self.curves.values() if points]


def _along(result: Mapping[str, Any], metric: str) -> list[_Point]:
    points = result.get("measures", {}).get("along", [])
    if not isinstance(points, list):
        return []
    return points if any(metric in p["metrics"] or metric in p.get("undefined", {}) for p in points) else []


def first_reaching(points: Sequence[_Point], metric: str, target: float) -> _Point | None:
    """The first evaluation of a run that is at least as good as the target; None: none is.

    Between two evaluations nothing is known: what is found is an upper bound, as coarse as they lie apart.
    """
    sign = -1.0 if is_lower_better(metric) else 1.0
    with_metric = (point for point in points if metric in point["metrics"])
    return next((point for point in with_metric if sign * point["metrics"][metric] >= sign * target), None)


def reached(
    folder: Path, *, metric: str, target: float | None, of: str | None = None, against: str | None = None,
    against_budget: float | None = None,
) -> dict[Group, list[Reached]]:  # fmt: skip
    """What all contenders with evaluations along the way took to a target, the cheapest in FLOPs first.

    Args:
        folder: of result files.
        metric: of the validation split.
        target: a value; None: what the contender `of` ends with, in the mean over its seeds.
        of: label of that contender; of several budgets the highest is meant.
        against: label of a baseline that the others are held against, seed by seed; None: none.
        against_budget: the baseline's; None: its highest.

    Raises:
        DataError: no run was evaluated along the way, the metric was not measured, or there is no such contender.
    """
    if (target is None) == (of is None):
        raise DataError("expected a target or the label of a contender whose end is the target; give one of the two")
    found: dict[Group, list[Reached]] = {}
    is_held = against is None
    for group, contenders in final_results(folder).items():
        runs = [of_one for finals in contenders if (of_one := _Runs.of(finals, metric)).ran]
        value = _end_of(_highest(runs, of, None), metric) if target is None else target
        if not runs or value is None:
            continue
        baseline = _highest(runs, against, against_budget)
        is_held = is_held or baseline is not None
        rows = [_reached(of_one, baseline, metric, value) for of_one in runs]
        found[group] = sorted(rows, key=lambda row: (row.flops.median is None, row.flops.median or 0.0, row.label))
    if not found:
        raise DataError(
            f"{folder}: expected final runs with {metric!r} along the way"
            + (f", of {of!r} too" if of else "")
            + '; found none. Give the experiment {"evaluate": {"at": [0.25, 0.5, 0.75]}}'
        )
    if not is_held:
        known = sorted({f"{row.label} at {row.budget:g}" for rows in found.values() for row in rows})
        at = "" if against_budget is None else f" at {against_budget:g}"
        raise DataError(
            f"expected a baseline that was evaluated along the way, found {against}{at}; known: {', '.join(known)}"
        )
    return found


def is_meant(contender: Finals | Reached, label: str | None, budget: float | None) -> bool:
    """Whether it has this label and budget; None: any budget."""
    return contender.label == label and budget in (None, contender.budget)


def _highest(runs: Sequence[_Runs], label: str | None, budget: float | None) -> _Runs | None:
    """The contender of a label at a budget, or at its highest."""
    alike = [of_one for of_one in runs if is_meant(of_one.finals, label, budget)]
    return max(alike, key=lambda r: r.finals.budget, default=None)


def _end_of(runs: _Runs | None, metric: str) -> float | None:
    """What a contender ends with, in the mean; None: a run ends with nothing that is defined."""
    ends = [] if runs is None else [points[-1]["metrics"].get(metric) for points in runs.ran]
    defined = [end for end in ends if end is not None]
    return mean(defined) if ends and len(defined) == len(ends) else None


def _best(runs: _Runs, metric: str) -> float | None:
    """The mean of the best evaluations of those runs in which the metric is defined at all."""
    choose = min if is_lower_better(metric) else max
    values = [[point["metrics"][metric] for point in points if metric in point["metrics"]] for points in runs.ran]
    return mean(map(choose, filter(None, values))) if any(values) else None


def _reached(runs: _Runs, baseline: _Runs | None, metric: str, target: float) -> Reached:
    taken = {
        name: _taken(runs, None if baseline is runs else baseline, name, metric=metric, target=target)
        for name in _COUNTED
    }
    return Reached(
        label=runs.finals.label, budget=runs.finals.budget, target=target, seeds=len(runs.curves),
        reached=sum(first_reaching(points, metric, target) is not None for points in runs.curves.values()),
        best=_best(runs, metric), **taken,
    )  # fmt: skip


def _taken(runs: _Runs, baseline: _Runs | None, name: str, *, metric: str, target: float) -> Taken:
    costs = _costs(runs, name, metric, target)
    known = [cost for cost in costs.values() if isfinite(cost)]
    middle = median(costs.values())
    reasons = {unsound(runs.finals.by_seed[seed], name) for seed, points in runs.curves.items() if points}
    return Taken(
        median=middle if isfinite(middle) else None, low=min(known, default=None),
        at_least=median(cost if isfinite(cost) else _end(runs, seed, name) for seed, cost in costs.items()),
        high=max(known) if len(known) == len(costs) else None, doubt=", ".join(sorted(reasons - {""})),
        against=None if baseline is None else _against(runs, baseline, name, metric=metric, target=target),
    )  # fmt: skip


def _costs(runs: _Runs, name: str, metric: str, target: float) -> dict[int, float]:
    """Seed → what its run took; infinite: it did not get there."""
    points = {seed: first_reaching(of_seed, metric, target) for seed, of_seed in runs.curves.items()}
    return {seed: inf if point is None else float(point[_COUNTED[name]]) for seed, point in points.items()}


def _end(runs: _Runs, seed: int, name: str) -> float:
    """What a run took in all; 0: it diverged, and nobody knows."""
    points = runs.curves[seed]
    return float(points[-1][_COUNTED[name]]) if points else 0.0


def _against(runs: _Runs, baseline: _Runs, name: str, *, metric: str, target: float) -> Against:
    ours, theirs = (_costs(side, name, metric, target) for side in (runs, baseline))
    common = sorted(set(ours) & set(theirs))
    missed, they_missed = ({s for s in common if not isfinite(costs[s])} for costs in (ours, theirs))
    if len(common) < 2:
        return Against(why="fewer than two common seeds")
    if missed and they_missed:
        count = f"{len(missed)} and {len(they_missed)} of {len(common)}"
        return Against(why=f"both did not get there with some seeds ({count})")
    ends = [{s: c if isfinite(c) else _end(side, s, name) for s, c in costs.items() if s in common}
            for side, costs in ((runs, ours), (baseline, theirs))]  # fmt: skip
    logarithms = compare_logarithms(*ends)
    if logarithms is None:
        return Against(why="a run diverged")
    ratio, bound = Ratio.of(logarithms), "at least" if missed else "at most" if they_missed else ""
    if bound == {"better": "at least", "worse": "at most"}.get(ratio.verdict):
        ratio = replace(ratio, verdict="undecided", why=f"it is {bound} that")
    if reason := doubt(runs.finals, baseline.finals, name):
        ratio = replace(ratio, verdict="undecided", why=ratio.why or reason)
    return Against(ratio=ratio, bound=bound)
