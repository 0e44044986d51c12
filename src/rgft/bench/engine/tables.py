"""Tables from the engine bench's result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rgft.bench.engine.overheads import runner as overheads
from rgft.bench.engine.runner import SCHEMA
from rgft.bench.results import read_results


def steps(folder: Path) -> str:
    """The steps timed below a folder as a Markdown table.

    Raises:
        DataError: there are none.
    """
    return _steps(read_results(folder, SCHEMA, of="engine bench"))


def _steps(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| workload | step | FLOPs | time | gradients + moments + activations | time of predicted |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: (r["workload"], -r["time_of_full"])):
        held = result["memory"]["total"] - result["memory"]["weights"]
        lines.append(
            f"| {result['workload']} | {result['cell']} | {result['flops_of_full']:.2f} | {result['time_of_full']:.2f} "
            f"| {held / 2**20:,.0f} MiB | {result['seconds_of_predicted']:.2f} |"
        )
    return "\n".join(lines)


def markdown(folder: Path) -> str:
    """All results of the engine bench: steps of each workload on each machine, and what RGFT itself costs.

    Raises:
        DataError: there are none.
    """
    tables: list[str] = []
    results = read_results(folder, SCHEMA, of="engine bench")
    for (workload, device), group in groupby(results, key=lambda result: (result["workload"], result["device"])):
        cells = list(group)
        place = _place(cells[0]["environment"], device)
        tables += [f"**{workload}, {cells[0]['rows']} rows, {cells[0]['dtype']}, {place}**", _steps(cells)]
    return "\n\n".join([*tables, "**What RGFT itself costs**", overheads.table(folder)])


def _place(environment: Mapping[str, Any], device: str) -> str:
    if device == "cpu":
        cpu = environment["cpu"]
        return f"{cpu['usable_cores']} cores, {cpu['model']}"
    return ", ".join(accelerator.get("name", accelerator["type"]) for accelerator in environment["accelerators"])
