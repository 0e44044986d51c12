"""What it takes to reach a target, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from rgft.bench.convergence import Reached, Taken


def lines_of(row: Reached, *, metric: str) -> Iterator[str]:
    """A contender's: what its runs took, and beside a baseline's."""
    doubt = f" ({row.seconds.doubt})" if row.seconds.doubt else ""
    told = [
        _cost(row.flops, ".3f", " of full fine-tuning's FLOPs"), _cost(row.steps, ".0f", " steps"),
        _cost(row.epochs, ".2f", " epochs"), _cost(row.seconds, ".0f", f" s{doubt}"),
    ]  # fmt: skip
    runs = f"{row.reached} of {row.seeds} runs"
    lead = "" if row.reached else "not reached; "
    best = "undefined" if row.best is None else f"{row.best:.3f}"
    yield f"{row.label} at {row.budget:g} ({runs}): {lead}{', '.join(told)}; best {metric} {best}"
    if (against := row.flops.against) is not None and against.ratio is None:
        yield f"    not comparable with the baseline: {against.why}"
        return
    for name, taken in (("FLOPs", row.flops), ("steps", row.steps), ("seconds", row.seconds)):
        if said := _against(taken):
            yield f"    {name}: {said}"


def _cost(taken: Taken, form: str, unit: str) -> str:
    """The median and the range, or what it is more than."""
    if taken.median is None:
        return f"> {taken.at_least:{form}}{unit}"
    spread = "" if taken.low == taken.high else f" ({taken.low:{form}} … {_or_never(taken.high, form)})"
    return f"{taken.median:{form}}{spread}{unit}"


def _or_never(value: float | None, form: str) -> str:
    return "not reached" if value is None else f"{value:{form}}"


def _against(taken: Taken) -> str:
    """Beside the baseline; empty: there is none."""
    if taken.against is None or taken.against.ratio is None:
        return ""
    ratio, bound = taken.against.ratio, f"{taken.against.bound} " if taken.against.bound else ""
    why = f" ({ratio.why})" if ratio.why else ""
    interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"{bound}{ratio.ratio:.3f} times the baseline's {interval}, {ratio.seeds} pairs: {ratio.verdict}{why}"
