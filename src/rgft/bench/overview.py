"""One table for all tasks: RGFT beside the methods that everyone asks about first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rgft.bench.cells import OF_SEEDS_ALONE, heading, line, mark
from rgft.bench.finals import Finals, final_results
from rgft.bench.group import Group, canonical

#: With batches passed as RGFT passes them: no padding, no unread positions.
_GROUPS: Mapping[str, Any] = {"config": {"execution": {"padding": "auto", "positions": "auto"}}}

#: Column → method and settings.
COLUMNS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "RGFT": ("rgft", {}),
    "RGFT, untuned": ("rgft", {"lr": "auto"}),
    "RGFT, cut by costs alone": ("rgft", {"config": {"mask": {"readout": 0.0}}}),
    "full fine-tuning, stopped": ("full", {}),
    "the same, no padding": ("full", _GROUPS),
    "LoRA": ("lora", {}),
    "LoRA, no padding": ("lora", _GROUPS),
    "last layers": ("last_n", {}),
    "classifier alone": ("linear_probe", {}),
    "LISA": ("lisa", {}),
    "half, by lot": ("random", {}),
}

_NOTE = (
    "Test split, means over seeds (their number): each task's score, then held-out loss. Of the FLOPs of full "
    "fine-tuning of the same run each method had the share that the row says; learning rates are tuned on validation "
    'data, but for "untuned", where a rule gives them. \\*: RGFT is better, †: worse, by the 95 % interval of '
    f"differences paired by seed and test example, three pairs at least; no mark: undecided. {OF_SEEDS_ALONE} Where "
    "RGFT was not tuned it is held against others as it is. The last layers, the classifier alone, LISA and components "
    "by lot have all that RGFT saves beside: cache, no padding, no unread positions, no dropout where nothing repeats."
)


def overview(folder: Path) -> str:
    """The comparisons as one Markdown table: a row for each task and budget at which RGFT has runs.

    Raises:
        DataError: see `final_results`.
    """
    found = [
        _row(group, budget, [finals for finals in contenders if finals.budget == budget])
        for group, contenders in final_results(folder).items()
        if not group.fixes_cuts
        for budget in sorted({finals.budget for finals in contenders})
    ]
    rows = [row for row in found if row]
    # A column in which no row has anything is left out.
    columns = [column for column in zip(["", *COLUMNS], *rows, strict=True) if not column[0] or any(column[1:])]
    names, *cells = zip(*columns, strict=True)
    return "\n".join([*heading(names), *map(line, cells), "", _NOTE])


def _row(group: Group, budget: float, contenders: list[Finals]) -> list[str]:
    """Its cells; none where RGFT has no runs of now, tuned or untuned, or nothing is beside it."""
    tuned, untuned, *others = found = [
        _find(contenders, method, settings) for method, settings in COLUMNS.values()
    ]  # fmt: skip
    rgft = tuned or untuned
    if rgft is None or not any(others):
        return []
    title = f"{group.title}, {budget:g}"
    return [title, *("" if finals is None else _cell(group, rgft, finals) for finals in found)]


def _find(contenders: list[Finals], method: str, settings: Mapping[str, Any]) -> Finals | None:
    return next(
        (
            finals
            for finals in contenders
            if finals.kind.is_current
            and finals.by_seed
            and (finals.method, _without_layers(finals.kind.settings)) == (method, canonical(settings))
        ),
        None,
    )


def _without_layers(settings: str) -> str:
    """Settings in canonical form, but for how many layers train: a deeper network begins its tuning with more."""
    plain = json.loads(settings)
    config = plain.get("config", {})
    if isinstance(policy := config.get("policy"), dict) and policy.keys() == {"layers"}:
        config.pop("policy")
    return canonical(plain if config else {key: value for key, value in plain.items() if key != "config"})


def _cell(group: Group, rgft: Finals, finals: Finals) -> str:
    values = (_value(rgft, finals, metric) for metric in (group.metric, "loss"))
    return f"{', '.join(values)} ({len(finals.by_seed)})"


def _value(rgft: Finals, finals: Finals, metric: str) -> str:
    if lack := finals.lacks(metric):
        return lack
    return f"{mean(finals.metric(metric).values()):.3f}{mark(rgft, finals, metric)}"
