"""Cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rgft.bench.finals import Finals
from rgft.bench.paired import difference, lacking

_MARKS = {"better": "\\*", "worse": "†"}


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
    return _MARKS.get(difference(reference, finals, metric).verdict, "")
