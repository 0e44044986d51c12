"""Two methods over all tasks: seed by seed on each, and over the tasks together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rgft.bench.finals import Finals, Group, final_results
from rgft.bench.statistics import Comparison, over_tasks
from rgft.bench.table import difference
from rgft.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a method does beside a baseline at one budget.

    Attributes:
        budget: share of full fine-tuning's FLOPs that the method was given.
        baseline_budget: that the baseline was given.
        by_task: each task's comparison.
        together: over tasks; None with fewer than two that are independent.
    """

    budget: float
    baseline_budget: float
    by_task: dict[Group, Comparison]
    together: Comparison | None


def verdicts(
    folder: Path, method: str, baseline: str, *, metric: str, margin: float = 0.0, against_budget: float | None = None
) -> list[Verdict]:
    """Compares two contenders at each budget at which both have final runs with common seeds.

    Args:
        folder: of result files.
        method, baseline: labels.
        metric: of the test split.
        margin: how much worse still counts as non-inferior, in the metric's unit.
        against_budget: the baseline's; None: the method's own.

    Raises:
        DataError: a label is unknown, or there is nothing to compare.
    """
    groups = {group: rows for group, rows in final_results(folder).items() if not group.fixes_cuts}
    known = sorted({finals.label for rows in groups.values() for finals in rows})
    for label in (method, baseline):
        if label not in known:
            near = get_close_matches(label, known, n=3) or known
            raise DataError(f"expected a contender with final runs, found {label!r}; nearest: {', '.join(near)}")
    found: dict[tuple[float, float], dict[Group, Comparison]] = {}
    for group, rows in groups.items():
        for ours, theirs in _pairs(rows, method, baseline, against_budget):
            budgets = (ours.budget, theirs.budget)
            found.setdefault(budgets, {})[group] = difference(ours, theirs, metric, margin=margin)
    if not found:
        raise DataError(
            f"{method} and {baseline}: expected final runs of both on a task, with two common seeds and "
            + ("the same budget" if against_budget is None else f"the baseline at {against_budget:g}")
            + "; found none"
        )
    return [
        Verdict(
            budget=ours, baseline_budget=theirs, by_task=by_task,
            together=over_tasks([(group.source, comparison) for group, comparison in by_task.items()], margin=margin),
        )
        for (ours, theirs), by_task in sorted(found.items())
    ]  # fmt: skip


def _pairs(
    rows: list[Finals], method: str, baseline: str, against_budget: float | None
) -> Iterator[tuple[Finals, Finals]]:
    for ours in (row for row in rows if row.label == method):
        wanted = ours.budget if against_budget is None else against_budget
        for theirs in (row for row in rows if row.label == baseline and row.budget == wanted):
            if len(set(ours.by_seed) & set(theirs.by_seed)) >= 2:
                yield ours, theirs
