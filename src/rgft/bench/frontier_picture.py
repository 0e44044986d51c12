"""A picture of quality against cost: RGFT, full fine-tuning and LoRA stand out, all others are there to be found."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rgft.bench.costs import Cost
from rgft.bench.figures import in_words, is_lower_better
from rgft.bench.finals import Kind
from rgft.bench.frontier import Frontier, Point
from rgft.bench.group import Group
from rgft.errors import DataError
from rgft.telemetry.atomic_write import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
#: Inches, at 100 pixels each: 1,200 pixels wide.
_WIDTH, _PANEL_HEIGHT, _LEGEND_ROW = 12.0, 3.9, 0.19
_LEGEND_COLUMNS = 7
#: Costs within this factor share a place for labels.
_NEAR = 1.4
_LABEL = {"facecolor": "white", "alpha": 0.7, "linewidth": 0.0, "pad": 0.5}

_COSTS: Mapping[Cost, str] = {
    "flops": "share of full fine-tuning's FLOPs", "seconds": "seconds of training", "joules": "joules of training",
    "co2_grams": "grams of CO2", "peak_memory": "peak memory, bytes",
}  # fmt: skip

#: Methods that stand out, in the order of the legend; RGFT does with other settings, too, dashed.
_STRONG = {"rgft": "#d62728", "full": "#1f4e9c", "lora": "#e08e0b"}
_MUTED = ("#8c8c8c", "#7f9a86", "#8a8fb0", "#b3907a", "#a884a0", "#6f8f9c")
_MARKERS = ("o", "s", "D", "^", "v", "<", ">", "*", "P", "X", "p", "h", "d", "H", "8")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a contender is drawn.

    Attributes:
        colour, marker: a pair of its own.
        is_strong: whether it stands out.
        is_dashed: a variant of one that does.
    """

    colour: str
    marker: str
    is_strong: bool = False
    is_dashed: bool = False


def styles(panels: Sequence[Iterable[Kind]]) -> dict[Kind, Style]:
    """A style for each kind of contender, those that stand out first; each pair of colour and marker is there once.

    RGFT with other settings stands out beside itself if it is on several tasks, or there is but one: what was changed
    to be looked at on one of many does not.

    Args:
        panels: the kinds of each task.

    Raises:
        DataError: there are more kinds than pairs.
    """
    found: dict[Kind, Style] = {}
    on = Counter(kind for kinds in panels for kind in set(kinds))
    strong = {method: iter(_MARKERS) for method in _STRONG}
    muted = product(_MARKERS, _MUTED)
    for kind in sorted(on, key=_place):
        is_plain = kind.is_plain and kind.is_current
        stands_out = is_plain if kind.method != "rgft" else is_plain or on[kind] >= min(2, len(panels))
        own = strong.get(kind.method, iter(())) if stands_out else iter(())
        bold = next(((marker, _STRONG[kind.method]) for marker in own), None)
        pair = bold or next(muted, None)
        if pair is None:
            raise DataError(f"expected no more methods than the {len(_MARKERS) * len(_MUTED)} styles, found more")
        marker, colour = pair
        is_strong = bold is not None
        found[kind] = Style(colour=colour, marker=marker, is_strong=is_strong, is_dashed=is_strong and not is_plain)
    return found


def _place(kind: Kind) -> tuple[int, bool, bool, Kind]:
    strong = list(_STRONG)
    place = strong.index(kind.method) if kind.method in strong else len(strong)
    return place, not kind.is_current, not kind.is_plain, kind


def drawn(found: Mapping[Group, Frontier]) -> dict[Group, Frontier]:
    """The tasks that have a panel: one contender at one budget is no picture."""
    return {group: frontier for group, frontier in found.items() if len(frontier.points) > 1}


def figure(found: Mapping[Group, Frontier], *, against: Cost) -> Figure:
    """Panels in rows of three, and one legend.

    Raises:
        DataError: no task has two contenders, or matplotlib (the extra `report`) is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("pictures need matplotlib; install rgft[report]") from error
    panels = drawn(found)
    if not panels:
        raise DataError("expected a task with two contenders to draw, found none")
    points = [point for frontier in panels.values() for point in frontier.points]
    style = styles([[point.kind for point in frontier.points] for frontier in panels.values()])
    names = _names(points)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = math.ceil(len(style) / _LEGEND_COLUMNS) * _LEGEND_ROW + 0.2
    width = _WIDTH if columns > 1 else _WIDTH * 2 / 3
    made = Figure(figsize=(width, rows * _PANEL_HEIGHT + legend), dpi=100, layout="constrained")
    FigureCanvasAgg(made)
    every = made.subplots(rows, columns, squeeze=False).ravel()
    for axes, (group, frontier) in zip(every, panels.items(), strict=False):
        _panel(axes, frontier, style, names, against)
        axes.set_title("\n".join(_lines(group.title)), fontsize=9)
    for axes in every[len(panels) :]:
        axes.remove()
    handles = {
        name: handle
        for axes in made.axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    listed = [names[kind] for kind in style]
    made.legend(
        [handles[name] for name in listed], listed, loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(listed)),
        fontsize=8, frameon=False,
    )  # fmt: skip
    return made


def draw(found: Mapping[Group, Frontier], path: Path, *, against: Cost) -> Path:
    """The picture as SVG or PNG, by the path's ending (written aside, then renamed).

    Raises:
        DataError: another ending, or as `figure`.
    """
    ending = path.suffix.removeprefix(".")
    if ending not in ("svg", "png"):
        raise DataError(f"{path}: expected a file name that ends in .svg or .png")
    made = figure(found, against=against)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        made.savefig(cast("IO[bytes]", file), format=ending)
    return path


def _names(points: Sequence[Point]) -> dict[Kind, str]:
    """What each kind is called in the legend: the shortest of its labels, each once."""
    shortest = {
        kind: min((point.label for point in points if point.kind == kind), key=lambda label: (len(label), label))
        for kind in {point.kind for point in points}
    }
    labels = list(shortest.values())
    return {
        kind: label if labels.count(label) == 1 or kind.is_plain else f"{label} {_leaves(json.loads(kind.settings))}"
        for kind, label in shortest.items()
    }


def _leaves(settings: Mapping[str, Any]) -> str:
    """Settings in a legend: the innermost names and their values."""
    return ", ".join(
        _leaves(value) if isinstance(value, dict) and value else f"{name} {value}" for name, value in settings.items()
    )


def _lines(title: str) -> list[str]:
    """A title in lines that a panel has room for."""
    first, _, rest = title.partition(", ")
    return [first, rest] if rest else [first]


def _panel(
    axes: Axes, frontier: Frontier, style: Mapping[Kind, Style], names: Mapping[Kind, str], against: Cost
) -> None:  # fmt: skip
    best = [point for point in frontier.points if point.is_on_frontier]
    axes.step([p.cost for p in best], [p.quality for p in best], where="post", color="0.85", zorder=0, linewidth=5.0)
    for kind, drawn_as in style.items():
        own = [point for point in frontier.points if point.kind == kind]
        if own:
            axes.errorbar(
                [point.cost for point in own], [point.quality for point in own],
                yerr=[point.error or 0.0 for point in own], label=names[kind], color=drawn_as.colour,
                marker=drawn_as.marker, linestyle="--" if drawn_as.is_dashed else "-", capsize=2.0,
                linewidth=2.0 if drawn_as.is_strong else 0.7, markersize=6.0 if drawn_as.is_strong else 4.5,
                elinewidth=1.2 if drawn_as.is_strong else 0.5, zorder=3 if drawn_as.is_strong else 2,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.25)
    if against == "flops":
        axes.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
        axes.set_xticks([], minor=True)
        costs = [point.cost for point in frontier.points]
        axes.set_xlim(min(0.04, 0.8 * min(costs)), max(1.3, 1.3 * max(costs)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel(_COSTS[against], fontsize=8)
    axes.set_ylabel(in_words(frontier.metric), fontsize=8)
    _limit(axes, frontier, style)
    _label(axes, best, style, names, up=not is_lower_better(frontier.metric))


def _limit(axes: Axes, frontier: Frontier, style: Mapping[Kind, Style]) -> None:
    """Shows what stands out and all that is not far behind; says how many are."""
    up = not is_lower_better(frontier.metric)
    ranked = sorted((point.quality for point in frontier.points), reverse=up)  # the best first
    shown = ranked[: math.ceil(0.9 * len(ranked))]
    shown += [point.quality for point in frontier.points if style[point.kind].is_strong]
    low, high = min(shown), max(shown)
    room = (high - low) or 0.1 * abs(high) or 1.0
    # Labels stand on the good side.
    bottom, top = (low - 0.12 * room, high + 0.3 * room) if up else (low - 0.3 * room, high + 0.12 * room)
    axes.set_ylim(bottom, top)
    if hidden := sum(not bottom <= quality <= top for quality in ranked):
        place, anchor = (0.02, "bottom") if up else (0.98, "top")
        axes.text(
            0.98, place, f"{hidden} more {'below' if up else 'above'}", transform=axes.transAxes, ha="right",
            va=anchor, fontsize=8, color="0.4",
        )  # fmt: skip


def _label(
    axes: Axes, best: Sequence[Point], style: Mapping[Kind, Style], names: Mapping[Kind, str], *, up: bool
) -> None:  # fmt: skip
    """Names the points on the frontier, those of about one cost above each other on the good side of the best."""
    near: list[list[Point]] = []
    for point in best:
        if near and point.cost < _NEAR * near[-1][0].cost:
            near[-1].append(point)
        else:
            near.append([point])
    for points in near:
        anchor = (max if up else min)(points, key=lambda point: point.quality)
        listed = sorted(points, key=lambda point: point.quality, reverse=not up)
        for number, point in enumerate(listed):
            axes.annotate(
                names[point.kind], (anchor.cost, anchor.quality), xytext=(0, (9 + 10 * number) * (1 if up else -1)),
                textcoords="offset points", ha="center", va="bottom" if up else "top", fontsize=8,
                color=style[point.kind].colour, zorder=4, bbox=_LABEL,
            )  # fmt: skip
