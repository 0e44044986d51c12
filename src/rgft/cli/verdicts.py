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
from rgft.bench.statistics import Comparison, Ratio
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
                "tasks": {
                    group.title: comparison.to_dict() | _beside(verdict, group)
                    for group, comparison in verdict.by_task.items()
                },
                "left_out": {group.title: why for group, why in verdict.left_out.items()},
                "together": None if verdict.together is None else verdict.together.to_dict(),
                "ratio_together": None if verdict.ratio_together is None else verdict.ratio_together.to_dict(),
            }
            for verdict in found
        ]
    }


def _beside(verdict: Verdict, group: Group) -> dict[str, Any]:
    """What a task's comparison has of a cost, and of scores that are to be equal."""
    beside = {"ratio": verdict.ratios.get(group), "score": verdict.scores.get(group)}
    told: dict[str, Any] = {name: found.to_dict() for name, found in beside.items() if found is not None}
    return told | ({"source": verdict.sources[group]} if group in verdict.sources else {})


def show(found: Sequence[Verdict], *, metric: str) -> None:
    """A table for each budget, and which tasks are not in it."""
    for verdict in found:
        title = f"{verdict.method} at {verdict.budget:g} against {verdict.baseline} at {verdict.baseline_budget:g}"
        sources = ", ".join(sorted(set(verdict.sources.values())))
        table = Table(title=f"{title}: {in_words(metric)}{f' ({sources})' if sources else ''}")
        headings = ["task", "better by", "95 % interval", "pairs", "verdict"]
        if verdict.ratios:
            headings[1:1] = ["is", "95 % interval of that"]
        if verdict.scores:
            headings.append("score higher by")
        for heading in headings:
            table.add_column(heading)
        for group, comparison in verdict.by_task.items():
            cells = _cells(comparison, str(comparison.seeds))
            if verdict.ratios:
                cells = (*_ratio(verdict.ratios.get(group), metric), *cells)
            if (score := verdict.scores.get(group)) is not None:
                cells = (*cells, " ".join(_cells(score, "")[:2]))
            table.add_row(group.title, *cells)
        together = f"{verdict.counted} tasks together, each corpus once"
        if verdict.together is not None:
            table.add_section()
            table.add_row(together, *_cells(verdict.together, f"{verdict.together.seeds} or more"))
        if (ratio := verdict.ratio_together) is not None:
            table.add_section()
            verdict_in_words = f"{ratio.verdict} ({ratio.why})" if ratio.why else ratio.verdict
            table.add_row(together, *_ratio(ratio, metric), "", "", f"{ratio.seeds} or more", verdict_in_words)
        console = Console()
        console.print(table)
        _show_left_out(console, {group.title: why for group, why in verdict.left_out.items()})


def _ratio(ratio: Ratio | None, metric: str) -> tuple[str, str]:
    """A cost as a multiple of the baseline's; of seconds, how many times as fast that is."""
    if ratio is None:
        return "", ""
    if metric == "seconds":
        return f"{1 / ratio.ratio:.2f} times as fast", f"{1 / ratio.high:.2f} … {1 / ratio.low:.2f}"
    changes = [100.0 * (value - 1.0) for value in (ratio.ratio, ratio.low, ratio.high)]
    return f"{ratio.ratio:.3f} times ({changes[0]:+.0f} %)", f"{changes[1]:+.0f} % … {changes[2]:+.0f} %"


def _show_left_out(console: Console, left_out: Mapping[str, str]) -> None:
    for title, why in left_out.items():
        console.print(f"left out: {title}: {why}", markup=False, highlight=False, soft_wrap=True)


def _cells(comparison: Comparison, pairs: str) -> tuple[str, ...]:
    interval = f"{_figure(comparison.low)} … {_figure(comparison.high)}"
    return _figure(comparison.difference), interval, pairs, said(comparison)


def _figure(value: float) -> str:
    """Of seconds and bytes, too."""
    return f"{value:+,.0f}" if abs(value) >= 1000.0 else f"{value:+.4f}"


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
        cost = f"{point.cost:.3f}" if against == "flops" else f"{point.cost:,.0f}"
        quality, mark = f"{point.quality:.4f}{error}", "yes" if point.is_on_frontier else ""
        label = point.label if point.acted else f"{point.label} (did not act)"
        table.add_row(label, cost, quality, str(point.seeds), mark)
    return table
