"""Tables from result files: means over seeds, costs, and paired comparisons with RGFT."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from rgft.bench import beside
from rgft.bench.cells import OF_SEEDS_ALONE, heading, line, seeds_alone
from rgft.bench.finals import Finals, final_results, without_superseded
from rgft.bench.group import Group
from rgft.bench.paired import difference, is_target, lacking, said, target_margin
from rgft.bench.statistics import Comparison
from rgft.errors import DataError
from rgft.telemetry.atomic_write import write_bytes

START, END = "<!-- results -->", "<!-- /results -->"

#: Beside a learning rate that is the lowest or highest of those that were tried.
_AT_EDGE = "‡"

_NOTE = (
    "Test split, mean ± standard deviation over seeds; learning rates chosen on validation data with other seeds, of "
    f"contenders named -auto by rule, untuned. {_AT_EDGE}: the lowest or highest rate tried: the best may lie beyond. "
    "Tuning: FLOPs of the runs that the rate was chosen by, as multiples of one full fine-tuning. Differences with "
    "95 % intervals over seeds and test examples, paired; the number of pairs is there where it is not that of the "
    f"row's seeds, and fewer than three decide nothing. {OF_SEEDS_ALONE} Non-inferior: five pairs or more, the "
    "interval above minus the margin, and the held-out loss not worse. Beside quality: means over the seeds that were "
    "asked; \\*: RGFT has less of what is bad or more of what is good, †: the other way, by the same intervals. "
    "Seconds are in the result files; they are comparable only where nothing else ran beside."
)


def markdown(folder: Path) -> str:
    """The comparisons as Markdown tables: one for each task and budget, all contenders against RGFT, seed by seed.

    Where RGFT has no runs at a budget (full fine-tuning at 1.0), its runs at the highest lower one are compared. Beside
    full fine-tuning at a higher budget, RGFT's runs at each lower one are held against the target.
    """
    parts: list[str] = []
    for group, found in final_results(folder).items():
        contenders = without_superseded(found)
        for budget in sorted({finals.budget for finals in contenders}):
            rows = [finals for finals in contenders if finals.budget == budget]
            reference = _reference(contenders, budget)
            parts += [_table(group, budget, rows, reference), beside.table(group, budget, rows, reference)]
        if targets := _targets(group, contenders):
            parts.append(targets)
    return "\n\n".join([*filter(None, parts), _NOTE])


def _table(group: Group, budget: float, contenders: list[Finals], reference: Finals | None) -> str:
    name = group.metric.replace("_", " ")
    whose = "RGFT's" if reference is None or reference.budget == budget else f"RGFT's at {reference.budget:g}:"
    headings = [
        "", "lr", "tuning", "FLOPs", "steps", name, "held-out loss", f"{whose} {name} higher by",
        f"{whose} loss lower by", "",
    ]  # fmt: skip
    lines = [
        f"**{group.heading}, {budget:g} of full fine-tuning's FLOPs**", "", *heading(headings),
    ]  # fmt: skip
    lines += [
        _row(finals, reference, group.metric)
        for finals in sorted(contenders, key=lambda row: (row is not reference, row.label))
    ]
    return "\n".join(lines)


def _reference(contenders: list[Finals], budget: float) -> Finals | None:
    plain = [finals for finals in contenders if finals.method == "rgft" and finals.is_plain and finals.by_seed]
    affordable = (finals for finals in plain if finals.budget <= budget)
    return max(affordable, key=lambda row: (row.budget, row.is_current), default=None)


def _row(finals: Finals, reference: Finals | None, metric: str) -> str:
    idle = "" if finals.acted else "; did not act in so short a run"
    title = f"{finals.title} ({finals.seeds}{idle})"
    if not finals.by_seed:
        return line([title, *[""] * 9])
    cells = [
        title, finals.rates + (f" {_AT_EDGE}" if finals.is_rate_at_edge else ""), f"{finals.tuning.flops:.1f}",
        f"{finals.flops:.2f}", f"{finals.steps:.0f}", _spread(finals, metric), _spread(finals, "loss"),
    ]  # fmt: skip
    if reference is None or finals is reference:
        return line([*cells, "", "", ""])
    compared = {name: _compared(reference, finals, name) for name in (metric, "loss")}
    cells += [_interval(comparison, of=finals) for comparison in compared.values()]
    # The loss is what a verdict with a margin has heard already.
    told = [comparison for comparison in compared.values() if comparison is not None]
    told = told[:1] if told and told[0].margin > 0.0 else told
    return line([*cells, ", ".join(dict.fromkeys(_short(comparison) for comparison in told))])


def _compared(method: Finals, baseline: Finals, metric: str) -> Comparison | None:
    if lacking(method, baseline, metric):
        return None
    return difference(method, baseline, metric, margin=target_margin(method, baseline, metric))


def _interval(comparison: Comparison | None, *, of: Finals | None = None) -> str:
    """A difference, and of how many pairs it is where these are not a row's seeds."""
    if comparison is None:
        return ""
    pairs = f" ({comparison.seeds} pairs)" if of is None or comparison.seeds != len(of.by_seed) else ""
    return f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]{pairs}"


def _short(comparison: Comparison) -> str:
    return said(comparison) if comparison.margin > 0.0 else comparison.verdict + seeds_alone(comparison)


def _spread(finals: Finals, metric: str) -> str:
    if lack := finals.lacks(metric):
        return lack
    values = list(finals.metric(metric).values())
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _targets(group: Group, contenders: list[Finals]) -> str:
    """RGFT's runs beside full fine-tuning at the highest budget that it has: whether its score is kept."""
    fulls = [finals for finals in contenders if finals.method == "full" and finals.is_plain]
    full = max(fulls, key=lambda row: (row.budget, row.tuning.flops > 0.0, len(row.by_seed)), default=None)
    if full is None or group.fixes_cuts:
        return ""
    lines = [
        f"- {finals.label} at {finals.budget:g} beside {full.label} at {full.budget:g}: "
        f"{group.metric.replace('_', ' ')} {_interval(comparison)}: {said(comparison)}"
        for finals in sorted(contenders, key=lambda row: (row.label, row.budget))
        if is_target(finals, full) and (comparison := _compared(finals, full, group.metric)) is not None
    ]
    return "\n".join(lines)


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
