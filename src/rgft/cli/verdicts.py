"""Comparisons and frontiers as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rgft.bench.figures import in_words
from rgft.bench.frontier import Frontier
from rgft.bench.group import Group
from rgft.bench.paired import said
from rgft.bench.statistics import Comparison
from rgft.bench.verdict import Verdict


def as_dict(found: Sequence[Verdict]) -> dict[str, Any]:
    """All comparisons, for programs."""
    return {
        "budgets": [
            {
                "method": verdict.method,
                "baseline": verdict.baseline,
                "budget": verdict.budget,
                "baseline_budget": verdict.baseline_budget,
                "tasks": {group.title: comparison.to_dict() for group, comparison in verdict.by_task.items()},
                "left_out": {group.title: why for group, why in verdict.left_out.items()},
                "together": None if verdict.together is None else verdict.together.to_dict(),
            }
            for verdict in found
        ]
    }


def show(found: Sequence[Verdict], *, metric: str) -> None:
    """A table for each budget, and which tasks are not in it."""
    for verdict in found:
        title = f"{verdict.method} at {verdict.budget:g} against {verdict.baseline} at {verdict.baseline_budget:g}"
        table = Table(title=f"{title}: {in_words(metric)}")
        for heading in ("task", "better by", "95 % interval", "pairs", "verdict"):
            table.add_column(heading)
        for group, comparison in verdict.by_task.items():
            table.add_row(group.title, *_cells(comparison, str(comparison.seeds)))
        if verdict.together is not None:
            table.add_section()
            table.add_row(
                f"{verdict.counted} tasks together, each corpus once",
                *_cells(verdict.together, f"{verdict.together.seeds} or more"),
            )
        console = Console()
        console.print(table)
        _show_left_out(console, {group.title: why for group, why in verdict.left_out.items()})


def _show_left_out(console: Console, left_out: Mapping[str, str]) -> None:
    for title, why in left_out.items():
        console.print(f"left out: {title}: {why}", markup=False, highlight=False, soft_wrap=True)


def _cells(comparison: Comparison, pairs: str) -> tuple[str, ...]:
    interval = f"{comparison.low:+.4f} … {comparison.high:+.4f}"
    return f"{comparison.difference:+.4f}", interval, pairs, said(comparison)


def show_frontiers(found: Mapping[Group, Frontier], *, against: str) -> None:
    """A table for each task, the cheapest first, and who is not in it."""
    console = Console()
    for group, frontier in found.items():
        if frontier.points:
            console.print(_frontier_table(group, frontier, against))
            _show_left_out(console, {f"{group.title}: {name}": why for name, why in frontier.left_out.items()})
        else:
            _show_left_out(console, {group.title: "; ".join(dict.fromkeys(frontier.left_out.values()))})


def _frontier_table(group: Group, frontier: Frontier, against: str) -> Table:
    table = Table(title=group.title)
    for heading in ("contender", against, frontier.metric, "seeds", "on the frontier"):
        table.add_column(heading)
    for point in frontier.points:
        error = "" if point.error is None else f" ± {point.error:.4f}"
        cost = f"{point.cost:.3f}" if against == "flops" else f"{point.cost:.0f}"
        quality, mark = f"{point.quality:.4f}{error}", "yes" if point.is_on_frontier else ""
        label = point.label if point.acted else f"{point.label} (did not act)"
        table.add_row(label, cost, quality, str(point.seeds), mark)
    return table
