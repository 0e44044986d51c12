"""Cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rgft.bench.finals import Finals
from rgft.bench.paired import difference, is_decided_by_seeds, lacking
from rgft.bench.statistics import Comparison

_MARKS = {"better": "\\*", "worse": "†"}

#: What tables say of verdicts over seeds alone, and what that means.
SEEDS_ALONE = "°"
OF_SEEDS_ALONE = (
    f"{SEEDS_ALONE}: over seeds alone, where what single test examples bring is not known: less sure than it looks."
)


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def heading(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line(cells), "|" + "---|" * len(cells)]


def mark(reference: Finals | None, finals: Finals, metric: str) -> str:
    """Whether RGFT's runs are better or worse than a contender's, as tables show it; empty: neither is shown."""
    if reference is None or finals is reference or lacking(reference, finals, metric):
        return ""
    comparison = difference(reference, finals, metric)
    return _MARKS.get(comparison.verdict, "") + seeds_alone(comparison)


def seeds_alone(comparison: Comparison) -> str:
    """A sign where something is decided over seeds alone."""
    return SEEDS_ALONE if is_decided_by_seeds(comparison) else ""
