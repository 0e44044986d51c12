"""Cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

from rgft.bench.finals import Finals
from rgft.bench.paired import difference, lacking

_MARKS = {"better": "\\*", "worse": "†"}


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def mark(reference: Finals | None, finals: Finals, metric: str) -> str:
    """Whether RGFT's runs are better or worse than a contender's, as tables show it; empty: neither is shown."""
    if reference is None or finals is reference or lacking(reference, finals, metric):
        return ""
    return _MARKS.get(difference(reference, finals, metric).verdict, "")
