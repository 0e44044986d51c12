"""What runs are beside good or bad: how sure, what they forget, how far they go, what they are worth elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from rgft.bench.cells import heading, line, mark
from rgft.bench.figures import names
from rgft.bench.finals import Finals
from rgft.bench.group import Group
from rgft.bench.paired import on_different_texts

#: Figure → its column, in order. Scores on other texts follow, with these texts' names.
_COLUMNS: Mapping[str, str] = {
    "updated_per_step": "parameters a step, millions",
    "calibration_error": "calibration error",
    "forgetting": "loss of general texts higher by",
    "probe_forgetting": "another task's probe lower by",
    "similarity_drift": "drift of similarities",
    "weight_change": "change of weights",
}
_UNITS: Mapping[str, float] = {"updated_per_step": 1e6}


def table(group: Group, budget: float, contenders: Sequence[Finals], reference: Finals | None) -> str:
    """A Markdown table of the contenders whose runs were asked for more than their test split; empty: there are none.

    Args:
        group, budget: what they have in common.
        contenders: at this budget.
        reference: RGFT's runs, against which others are marked.
    """
    asked = [finals for finals in contenders if any(result.get("measures") for result in finals.by_seed.values())]
    columns = _columns(group, asked)
    if not columns:
        return ""
    rows = [
        line([f"{finals.title} ({finals.seeds})", *(_cell(finals, name, reference) for name in columns)])
        for finals in sorted(asked, key=lambda row: (row is not reference, row.label))
    ]
    title = f"Beside quality, at {budget:g} ({group.title}):"
    return "\n".join([title, "", *heading(["", *columns.values()]), *rows])


def _columns(group: Group, asked: Sequence[Finals]) -> dict[str, str]:
    """Of the figures that some run has."""
    if not asked:
        return {}
    known = {name for finals in asked for result in finals.by_seed.values() for name in names(result)}
    elsewhere = {
        f"{source}:{metric}": f"{metric.replace('_', ' ')} on {source}"
        for source in sorted({name.partition(":")[0] for name in known if ":" in name})
        for metric in (group.metric, "loss")
    }
    return {name: title for name, title in {**_COLUMNS, **elsewhere}.items() if name in known}


def _cell(finals: Finals, name: str, reference: Finals | None) -> str:
    if lack := finals.lacks(name):
        return "" if lack == "not measured" else lack
    value = mean(finals.metric(name).values()) / _UNITS.get(name, 1.0)
    differs = reference is not None and on_different_texts(reference, finals, name)
    return f"{value:.3f}{mark(reference, finals, name)}{' (other texts)' if differs else ''}"
