"""Tables from result files: means over seeds, costs, and paired comparisons with one contender."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rgft.bench.statistics import Comparison, compare
from rgft.errors import DataError
from rgft.telemetry.atomic_write import write_bytes

START, END = "<!-- results -->", "<!-- /results -->"


def final_results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Contender → seed → result, of all final runs below `folder`.

    Raises:
        DataError: there are none.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("**/*--final--*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["contender"], {})[result["seed"]] = result
    if not found:
        raise DataError(f"{folder}: expected results of final runs, found none; run the experiment first")
    return found


def metric(results: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """Seed → value on the test split."""
    return {seed: result["metrics"]["test"][name] for seed, result in results.items()}


def markdown(folder: Path, *, reference: str = "rgft") -> str:
    """The comparison as a Markdown table; every other contender is compared with `reference`, seed by seed."""
    found = final_results(folder)
    lines = [
        "| | lr | FLOPs | time | accuracy | held-out loss | RGFT's loss is lower by (95 %) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    slowest = max(mean(r["seconds"] for r in results.values()) for results in found.values())
    for label in sorted(found, key=lambda name: (name != reference, name)):
        results = found[label]
        comparison = None
        if label != reference and reference in found and len(set(found[reference]) & set(results)) > 1:
            comparison = compare(metric(found[reference], "loss"), metric(results, "loss"), higher_is_better=False)
        lines.append(_row(label, results, comparison, slowest))
    any_result = next(iter(next(iter(found.values())).values()))
    hardware = any_result["environment"].get("cpu", {})
    lines += [
        "",
        f"Test split, mean ± standard deviation over seeds; time relative to the slowest row, on {_cpu(hardware)}.",
    ]
    return "\n".join(lines)


def _row(label: str, results: Mapping[int, Mapping[str, Any]], comparison: Comparison | None, slowest: float) -> str:
    fraction = mean(r["ledger"]["flops"]["fraction_of_full"] for r in results.values())
    seconds = mean(r["seconds"] for r in results.values()) / slowest
    lr = "/".join(sorted({f"{r['lr']:g}" for r in results.values()}))
    cells = [
        f"{label} ({len(results)} seeds)", lr, f"{fraction:.2f}", f"{seconds:.2f}",
        _spread(list(metric(results, "accuracy").values())), _spread(list(metric(results, "loss").values())),
    ]  # fmt: skip
    if comparison is None:
        cells += ["", ""]
    else:
        cells += [f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]", comparison.verdict]
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _cpu(hardware: Mapping[str, Any]) -> str:
    return f"{hardware.get('count', '?')} cores ({hardware.get('model') or 'unknown processor'})"


def update(document: Path, table: str) -> None:
    """Puts the table between the markers of a Markdown file.

    Raises:
        DataError: the markers are missing.
    """
    text = document.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise DataError(f"{document}: expected the markers {START} and {END}")
    write_bytes(document, f"{before}{START}\n\n{table}\n\n{END}{after}".encode())
