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


Results = dict[str, dict[int, dict[str, Any]]]


def final_results(folder: Path) -> dict[str, Results]:
    """Comparison → contender → seed → result, of all final runs below `folder`.

    A comparison is of runs on the same task. Fixed cuts are one of their own, with RGFT's runs on that task.

    Raises:
        DataError: there are none.
    """
    found: dict[str, Results] = {}
    for path in sorted(folder.glob("**/*--final--*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(_title(result), {}).setdefault(result["contender"], {})[result["seed"]] = result
    if not found:
        raise DataError(f"{folder}: expected results of final runs, found none; run the experiment first")
    for title, results in found.items():
        if title.endswith(CUTS) and "rgft" in (whole := found.get(title.removesuffix(CUTS), {})):
            results["rgft"] = whole["rgft"]
    return found


CUTS = ", the cut fixed by hand"


def _title(result: Mapping[str, Any]) -> str:
    task, run = result["task"], result["run"]
    name = {"rotten_tomatoes": "Rotten Tomatoes", "sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC"}[
        task.get("name", "rotten_tomatoes")
    ]
    epochs = "one epoch" if run["epochs"] == 1 else f"{run['epochs']:g} epochs"
    return f"{name}, {task['train_size']:,} examples, {epochs}" + (CUTS if result["method"] == "cut" else "")


def metric(results: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    """Seed → value on the test split."""
    return {seed: result["metrics"]["test"][name] for seed, result in results.items()}


def markdown(folder: Path, *, reference: str = "rgft") -> str:
    """The comparisons as Markdown tables; every other contender is compared with `reference`, seed by seed."""
    found = final_results(folder)
    tables = [_table(title, results, reference) for title, results in sorted(found.items())]
    note = (
        "Test split, mean ± standard deviation over seeds; learning rates chosen on validation data with other seeds; "
        "differences with 95 % intervals, paired by seed. Seconds are in the result files; they are comparable only "
        "where nothing else ran beside."
    )
    return "\n\n".join([*tables, note])


def _table(title: str, found: Results, reference: str) -> str:
    lines = [
        f"**{title}**",
        "",
        "| | lr | FLOPs | steps | accuracy | held-out loss | RGFT's accuracy higher by | RGFT's loss lower by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label in sorted(found, key=lambda name: (name != reference, name)):
        results, comparisons = found[label], None
        if label != reference and reference in found and len(set(found[reference]) & set(results)) > 1:
            comparisons = tuple(
                compare(metric(found[reference], name), metric(results, name), higher_is_better=name == "accuracy")
                for name in ("accuracy", "loss")
            )
        lines.append(_row(label, results, comparisons))
    return "\n".join(lines)


def _row(label: str, results: Mapping[int, Mapping[str, Any]], comparisons: tuple[Comparison, ...] | None) -> str:
    fraction = mean(r["ledger"]["flops"]["fraction_of_full"] for r in results.values())
    steps = mean(r["steps"] for r in results.values())
    lr = "/".join(sorted({f"{r['lr']:g}" for r in results.values()}))
    cells = [
        f"{label} ({len(results)} seeds)", lr, f"{fraction:.2f}", f"{steps:.0f}",
        _spread(list(metric(results, "accuracy").values())), _spread(list(metric(results, "loss").values())),
    ]  # fmt: skip
    if comparisons is None:
        cells += ["", "", ""]
    else:
        cells += [f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in comparisons]
        cells.append(", ".join(dict.fromkeys(c.verdict for c in comparisons)))
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


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
