"""Comparisons and frontiers as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rgft.bench.finals import Group
from rgft.bench.frontier import Point
from rgft.bench.statistics import Comparison
from rgft.bench.verdict import Verdict


def as_dict(found: Sequence[Verdict]) -> dict[str, Any]:
    """All comparisons, for programs."""
    return {
        "budgets": [
            {
                "budget": verdict.budget,
                "baseline_budget": verdict.baseline_budget,
                "tasks": {group.title: comparison.to_dict() for group, comparison in verdict.by_task.items()},
                "together": None if verdict.together is None else verdict.together.to_dict(),
            }
            for verdict in found
        ]
    }


def show(found: Sequence[Verdict], *, method: str, baseline: str, metric: str) -> None:
    """A table for each budget."""
    for verdict in found:
        table = Table(
            title=f"{method} at {verdict.budget:g} against {baseline} at {verdict.baseline_budget:g}: test {metric}"
        )
        for heading in ("task", "better by", "95 % interval", "pairs", "verdict"):
            table.add_column(heading)
        for group, comparison in verdict.by_task.items():
            table.add_row(group.title, *_cells(comparison))
        if verdict.together is not None:
            table.add_section()
            table.add_row("all tasks, each source once", *_cells(verdict.together))
        Console().print(table)


def _cells(comparison: Comparison) -> tuple[str, ...]:
    verdict: str = comparison.verdict
    if verdict == "non-inferior":
        verdict += f" (margin {comparison.margin:g})"
    interval = f"{comparison.low:+.4f} … {comparison.high:+.4f}"
    return f"{comparison.difference:+.4f}", interval, str(comparison.seeds), verdict


def show_frontiers(found: Mapping[Group, Sequence[Point]], *, metric: str, against: str) -> None:
    """A table for each task, the cheapest first."""
    for group, points in found.items():
        table = Table(title=group.title)
        for heading in ("contender", against, metric, "seeds", "on the frontier"):
            table.add_column(heading)
        for point in points:
            error = "" if point.error is None else f" ± {point.error:.4f}"
            cost = f"{point.cost:.3f}" if against == "flops" else f"{point.cost:.0f}"
            table.add_row(
                point.label,
                cost,
                f"{point.quality:.4f}{error}",
                str(point.seeds),
                "yes" if point.is_on_frontier else "",
            )
        Console().print(table)
