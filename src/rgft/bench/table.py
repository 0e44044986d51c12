"""Tables from result files: means over seeds, costs, and paired comparisons with RGFT."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from rgft.bench.finals import LOWER_IS_BETTER, Finals, Group, final_results
from rgft.bench.statistics import Comparison, compare
from rgft.errors import DataError
from rgft.telemetry.atomic_write import write_bytes

START, END = "<!-- results -->", "<!-- /results -->"


def markdown(folder: Path) -> str:
    """The comparisons as Markdown tables: one for each task and budget, all contenders against RGFT, seed by seed.

    Where RGFT has no runs at a budget (full fine-tuning at 1.0), its runs at the highest lower one are compared.
    """
    tables: list[str] = []
    for group, contenders in final_results(folder).items():
        tables += [
            _table(group, budget, [finals for finals in contenders if finals.budget == budget], contenders)
            for budget in sorted({finals.budget for finals in contenders})
        ]
    note = (
        "Test split, mean ± standard deviation over seeds; learning rates chosen on validation data with other seeds, "
        "of contenders named -auto by rule, untuned; differences with 95 % intervals, paired by seed. Seconds are in "
        "the result files; they are comparable only where nothing else ran beside."
    )
    return "\n\n".join([*tables, note])


def _table(group: Group, budget: float, rows: list[Finals], contenders: list[Finals]) -> str:
    reference = _reference(contenders, budget)
    name = group.metric.replace("_", " ")
    cuts = ", the cut fixed by hand" if group.fixes_cuts else ""
    lines = [
        f"**{group.title}{cuts}, {budget:g} of full fine-tuning's FLOPs**",
        "",
        f"| | lr | FLOPs | steps | {name} | held-out loss | RGFT's {name} higher by | RGFT's loss lower by | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _row(finals, reference, group.metric)
        for finals in sorted(rows, key=lambda row: (row is not reference, row.label))
    ]
    return "\n".join(lines)


def _reference(contenders: list[Finals], budget: float) -> Finals | None:
    plain = [finals for finals in contenders if finals.method == "rgft" and finals.is_plain and finals.by_seed]
    affordable = (finals for finals in plain if finals.budget <= budget)
    return max(affordable, key=lambda row: (row.budget, row.is_current), default=None)


def _row(finals: Finals, reference: Finals | None, metric: str) -> str:
    title = f"{finals.label} ({finals.seeds})"
    if not finals.by_seed:
        return "| " + " | ".join([title, *[""] * 8]) + " |"
    cells = [
        title, finals.rates, f"{finals.flops:.2f}",
        f"{finals.steps:.0f}", _spread(list(finals.metric(metric).values())),
        _spread(list(finals.metric("loss").values())),
    ]  # fmt: skip
    if reference is None or finals is reference or len(set(reference.by_seed) & set(finals.by_seed)) < 2:
        return "| " + " | ".join([*cells, "", "", ""]) + " |"
    comparisons = [difference(reference, finals, name) for name in (metric, "loss")]
    cells += [f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]" for c in comparisons]
    cells.append(", ".join(dict.fromkeys(c.verdict for c in comparisons)))
    return "| " + " | ".join(cells) + " |"


def difference(method: Finals, baseline: Finals, metric: str, *, margin: float = 0.0) -> Comparison:
    """How much better a contender is than another, seed by seed; see `compare`."""
    return compare(
        method.metric(metric), baseline.metric(metric), higher_is_better=metric not in LOWER_IS_BETTER, margin=margin
    )


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
