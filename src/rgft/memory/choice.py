"""What a run does to keep to a memory budget, what costs least first.

In this order: (1) everything as it is; (2) the activation cache gets what is left, down to nothing; (3) fewer rows at
once, with gradients accumulated: slower, the same gradient up to rounding; (4) gradient checkpointing: layers are
computed twice, the same gradient; (5) a deeper cut: lower layers are not trained at all. A deeper cut comes last: it
is taken only where no smaller pass and no checkpointing would hold the one above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rgft.errors import BudgetError
from rgft.memory.forecast import MemoryForecast
from rgft.plan import MemoryPlan
from rgft.sizes import size_text

#: A probe needs an example that makes a step, and one to judge it by.
MIN_PROBE = 2


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a run would do if memory were no matter.

    Attributes:
        lowest_cut: of all that it trains; 0: everything, at least while it measures.
        may_split: whether its batches may be passed in pieces.
        probe_size: examples per probe, at most; 0: none.
        cache_bytes: of activations in the same memory, at most; 0: none are kept there.
    """

    lowest_cut: int = 0
    may_split: bool = True
    probe_size: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One way to make a step."""

    cut: int
    rows: int
    checkpointing: bool
    needed: int


def choose(forecast: MemoryForecast, limit: int, wish: Wish) -> MemoryPlan:
    """The first way that fits.

    Raises:
        BudgetError: none does; the message says what the least of them needs.
    """
    chosen = _first(forecast, limit, wish, may_split=wish.may_split)
    if chosen is None:
        raise BudgetError(_nothing_fits(forecast, limit, wish))
    by_cut = {
        cut: forecast.parts(cut, rows=chosen.rows, checkpointing=chosen.checkpointing, moments_from=chosen.cut)
        for cut in forecast.cuts
        if cut >= chosen.cut
    }
    probe_size = _probe_size(forecast, limit, wish.probe_size, chosen)
    plan = MemoryPlan(
        limit=limit, needed=chosen.needed, rows=forecast.rows, tokens=forecast.tokens, rows_per_pass=chosen.rows,
        parts=by_cut[chosen.cut],
        checkpointing=chosen.checkpointing, lowest_cut=chosen.cut,
        by_cut=tuple((cut, sum(parts.values())) for cut, parts in by_cut.items()), probe_size=probe_size,
        probes=forecast.probe(probe_size, lowest_cut=chosen.cut) if probe_size else 0,
        holds_cache=wish.cache_bytes > 0, choices=(),
    )  # fmt: skip
    return replace(plan, choices=tuple(_choices(forecast, plan, wish)))


def _first(forecast: MemoryForecast, limit: int, wish: Wish, *, may_split: bool) -> _Way | None:
    return next((way for way in _ways(forecast, wish, may_split=may_split) if way.needed <= limit), None)


def _ways(forecast: MemoryForecast, wish: Wish, *, may_split: bool, deepest: bool = False) -> Iterator[_Way]:
    cuts = [cut for cut in forecast.cuts if cut >= wish.lowest_cut] or forecast.cuts[-1:]
    for cut in cuts[-1:] if deepest else cuts:
        for checkpointing in forecast.checkpointing_options:
            for rows in _halvings(forecast.rows) if may_split else [forecast.rows]:
                needed = forecast.needed(cut, rows=rows, checkpointing=checkpointing)
                yield _Way(cut=cut, rows=rows, checkpointing=checkpointing, needed=needed)


def _halvings(rows: int) -> list[int]:
    """Rows, half of them, … 1."""
    found = [rows]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def _probe_size(forecast: MemoryForecast, limit: int, wanted: int, chosen: _Way) -> int:
    sizes = (size for size in range(wanted, MIN_PROBE - 1, -1))
    return next((size for size in sizes if forecast.probe(size, lowest_cut=chosen.cut) <= limit), 0)


def _choices(forecast: MemoryForecast, plan: MemoryPlan, wish: Wish) -> Iterator[str]:
    """What was done, in words."""
    rooms = [plan.room(cut) for cut, _ in plan.by_cut if cut > 1]
    if plan.holds_cache and rooms and min(rooms) < wish.cache_bytes:
        # Deeper cuts need less, so that more is left.
        yield f"activation cache: what is left, {size_text(rooms[0])} to {size_text(max(rooms))} by where the cut is"
    if plan.rows_per_pass < plan.rows:
        yield f"passes of at most {plan.rows_per_pass} of {plan.rows} rows, gradients accumulated"
    if plan.checkpointing and not forecast.is_checkpointing:
        yield "gradient checkpointing: layers above the cut are computed twice"
    if plan.lowest_cut > wish.lowest_cut:
        yield f"nothing below depth {plan.lowest_cut} is trained: only {_trained(forecast, plan.lowest_cut)}"
    if plan.probe_size < wish.probe_size:
        yield (
            f"probes of at most {plan.probe_size} examples"
            if plan.probe_size
            else "no probes: they would need " + (size_text(forecast.probe(MIN_PROBE, lowest_cut=plan.lowest_cut)))
        )
    if not wish.may_split:
        better = _first(forecast, plan.limit, wish, may_split=True)
        if better is not None and better.cut < plan.lowest_cut:
            yield f"a loop that makes batches of at most {better.rows} rows could have {_title(forecast, better)}"


def _nothing_fits(forecast: MemoryForecast, limit: int, wish: Wish) -> str:
    least = min(_ways(forecast, wish, may_split=wish.may_split, deepest=True), key=lambda way: way.needed)
    message = (
        f"the memory budget of {size_text(limit)} ({limit} bytes) holds no plan of this run, whose weights alone take "
        f"{size_text(forecast.weights)}; the least that one needs is {size_text(least.needed)} ({least.needed} bytes): "
        f"{_title(forecast, least)}"
    )
    if not wish.may_split:
        smaller = _first(forecast, limit, wish, may_split=True)
        if smaller is not None:
            return f"{message}. With batches of at most {smaller.rows} rows it would hold {_title(forecast, smaller)}"
    return f"{message}. Shorter inputs, a smaller model, or weights in bf16 need less"


def _title(forecast: MemoryForecast, way: _Way) -> str:
    with_checkpointing = "with" if way.checkpointing else "without"
    return (
        f"passes of {way.rows} × {forecast.tokens} {with_checkpointing} checkpointing that train only "
        f"{_trained(forecast, way.cut)}"
    )


def _trained(forecast: MemoryForecast, cut: int) -> str:
    """What lies above a cut, in words."""
    layers = len(forecast.partition.layers)
    trained = min(layers, max(0, layers + 1 - cut))
    if trained:
        return f"the top {trained} of {layers} layers"
    kinds = {component.kind for component in forecast.partition.above(cut)}
    if "lm_head" in kinds:
        return "the language model's head"
    return "the classifier" if "classifier" in kinds else "what follows the layers"
