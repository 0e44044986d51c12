"""Two methods over all tasks: seed by seed on each, and over the tasks together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path

from rgft.bench.figures import names
from rgft.bench.finals import SCORE, Finals, Kind, final_results, metric_of
from rgft.bench.group import Group
from rgft.bench.paired import agreeing, difference, lacking, target_margin
from rgft.bench.statistics import Comparison, counts, over_tasks
from rgft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a method does beside a baseline at one budget.

    Attributes:
        method, baseline: labels; where one stands for several contenders, with its settings.
        budget: share of full fine-tuning's FLOPs that the method was given.
        baseline_budget: that the baseline was given.
        by_task: each task's comparison.
        left_out: the other tasks, and why.
        together: over tasks; None with fewer than two that are independent and have enough pairs.
        counted: how many tasks that is over.
    """

    method: str
    baseline: str
    budget: float
    baseline_budget: float
    by_task: Mapping[Group, Comparison]
    left_out: Mapping[Group, str]
    together: Comparison | None
    counted: int


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A contender to be found on each task: by what it is, its label aside.

    Attributes:
        label: as it was given; of several alike on a task, the one of that label is meant.
        name: for people.
        kind: what it is.
        budget: of the runs.
    """

    label: str
    name: str
    kind: Kind
    budget: float = 1.0

    def at(self, budget: float) -> _Side:
        return replace(self, budget=budget)

    def among(self, rows: Collection[Finals]) -> Finals | str:
        """Its runs on a task, or why there are none to take."""
        alike = [row for row in rows if (row.kind, row.budget) == (self.kind, self.budget)]
        found = [row for row in alike if row.label == self.label] or alike
        if len(found) == 1:
            return found[0]
        if found:
            return f"{self.label} may be {' or '.join(row.label for row in found)}: give one of these labels"
        return f"no final runs of {self.name} at {self.budget:g}"


def verdicts(
    folder: Path, method: str, baseline: str, *, metric: str, margin: float | None = None,
    against_budget: float | None = None,
) -> list[Verdict]:  # fmt: skip
    """Compares two contenders at each budget at which both have final runs with common seeds.

    A contender is the same on all tasks that has the same method with the same settings, whatever its label there.

    Args:
        folder: of result files.
        method, baseline: labels.
        metric: of the test split; `SCORE`: each task's own.
        margin: how much worse still counts as non-inferior, in the metric's unit. None: 0, but where RGFT's score is
            held against full fine-tuning's at a higher budget, that of the target.
        against_budget: the baseline's; None: the method's own.

    Raises:
        DataError: a label is unknown, or there is nothing to compare.
    """
    groups = {group: rows for group, rows in final_results(folder).items() if not group.fixes_cuts}
    ours, theirs = (_sides(groups, label) for label in (method, baseline))
    budgets = sorted({row.budget for rows in groups.values() for row in rows if row.kind in {s.kind for s in ours}})
    tried = [
        _verdict(groups, our.at(budget), their.at(budget if against_budget is None else against_budget), metric, margin)
        for budget, our, their in product(budgets, ours, theirs)
    ]
    if found := [verdict for verdict in tried if verdict.by_task]:
        return found
    _require_metric(groups, metric)
    reasons = dict.fromkeys(f"  {group.title}: {why}" for verdict in tried for group, why in verdict.left_out.items())
    raise DataError(
        f"{method} and {baseline}: expected final runs of both on a task, with two common seeds and "
        + ("the same budget" if against_budget is None else f"the baseline at {against_budget:g}")
        + "; found none\n"
        + "\n".join(reasons)
    )


def _sides(groups: Mapping[Group, Collection[Finals]], label: str) -> list[_Side]:
    """What a label stands for: one contender, or several with settings of their own."""
    rows = [row for rows in groups.values() for row in rows]
    kinds = sorted({row.kind for row in rows if row.label == label}, key=lambda kind: (not kind.is_plain, kind))
    if not kinds:
        known = sorted({row.label for row in rows})
        near = get_close_matches(label, known, n=3) or known
        raise DataError(f"expected a contender with final runs, found {label!r}; nearest: {', '.join(near)}")
    return [
        _Side(label=label, kind=kind, name=label if len(kinds) == 1 or kind.is_plain else f"{label} {kind.settings}")
        for kind in kinds
    ]


def _require_metric(groups: Mapping[Group, Collection[Finals]], metric: str) -> None:
    rows = [row for rows in groups.values() for row in rows]
    known = {name for row in rows for result in row.by_seed.values() for name in names(result)}
    if metric not in known | {SCORE}:
        raise DataError(f"expected results with the metric {metric!r}, found {sorted(known)}")


def _verdict(
    groups: Mapping[Group, Collection[Finals]], ours: _Side, theirs: _Side, metric: str, margin: float | None
) -> Verdict:  # fmt: skip
    by_task: dict[Group, Comparison] = {}
    losses: dict[Group, Comparison] = {}
    left_out: dict[Group, str] = {}
    for group, rows in groups.items():
        method, baseline, name = ours.among(rows), theirs.among(rows), metric_of(group, metric)
        if isinstance(method, str) or isinstance(baseline, str):
            left_out[group] = method if isinstance(method, str) else str(baseline)
        elif lack := lacking(method, baseline, name):
            left_out[group] = lack
        else:
            own_margin = target_margin(method, baseline, name) if margin is None else margin
            by_task[group] = difference(method, baseline, name, margin=own_margin)
            if not lacking(method, baseline, "loss"):
                losses[group] = difference(method, baseline, "loss")
    counted = {group: comparison for group, comparison in by_task.items() if counts(comparison)}
    return Verdict(
        method=ours.name, baseline=theirs.name, budget=ours.budget, baseline_budget=theirs.budget, by_task=by_task,
        left_out=left_out, together=_together(counted, losses), counted=len(counted),
    )  # fmt: skip


def _together(scores: Mapping[Group, Comparison], losses: Mapping[Group, Comparison]) -> Comparison | None:
    """Over tasks; with a margin, what their losses say together must not be worse."""
    score = over_tasks([(group.corpora, comparison) for group, comparison in scores.items()])
    if score is None or score.margin <= 0.0:
        return score
    return agreeing(score, over_tasks([(g.corpora, losses[g]) for g in scores if g in losses]))
