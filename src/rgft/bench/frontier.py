"""The frontier: which methods nothing beats at their cost, and a picture of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, Literal, cast

from rgft.bench.finals import LOWER_IS_BETTER, Finals, Group, final_results
from rgft.errors import DataError
from rgft.telemetry.atomic_write import atomic_file

Cost = Literal["flops", "seconds"]
#: Runs end within a step of their budget: costs that differ by less are the same.
TOLERANCE = 0.02
_COSTS = {"flops": "share of full fine-tuning's FLOPs", "seconds": "seconds of training"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A contender's mean over seeds.

    Attributes:
        label: of the contender.
        cost: FLOPs as a share of full fine-tuning's, or seconds.
        quality: the metric's mean.
        error: its standard error; None with one seed.
        seeds: how many.
        is_on_frontier: no other is better at no more cost (within `TOLERANCE`).
    """

    label: str
    cost: float
    quality: float
    error: float | None
    seeds: int
    is_on_frontier: bool


def frontiers(folder: Path, *, metric: str, against: Cost = "flops") -> dict[Group, list[Point]]:
    """All contenders of each task, the cheapest first; fixed cuts are left out.

    Args:
        folder: of result files.
        metric: of the test split.
        against: what they cost.

    Raises:
        DataError: there are no results, or the metric was not measured.
    """
    return {
        group: _points([finals for finals in contenders if finals.by_seed], metric, against)
        for group, contenders in final_results(folder).items()
        if not group.fixes_cuts
    }


def _points(contenders: Sequence[Finals], metric: str, against: Cost) -> list[Point]:
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    values = [list(finals.metric(metric).values()) for finals in contenders]
    costs = [finals.flops if against == "flops" else finals.seconds for finals in contenders]
    qualities = [mean(of_seeds) for of_seeds in values]

    def is_beaten(index: int) -> bool:
        return any(
            costs[other] <= (1.0 + TOLERANCE) * costs[index] and sign * qualities[other] > sign * qualities[index]
            for other in range(len(contenders))
        )

    points = [
        Point(
            label=finals.label, cost=costs[index], quality=qualities[index],
            error=stdev(values[index]) / len(values[index]) ** 0.5 if len(values[index]) > 1 else None,
            seeds=len(values[index]), is_on_frontier=not is_beaten(index),
        )
        for index, finals in enumerate(contenders)
    ]  # fmt: skip
    return sorted(points, key=lambda point: (point.cost, point.label))


def draw(found: dict[Group, list[Point]], path: Path, *, metric: str, against: Cost) -> Path:
    """A picture with one panel a task, as SVG or PNG by the path's ending (written aside, then renamed).

    Raises:
        DataError: another ending, or matplotlib (the extra `report`) is missing.
    """
    ending = path.suffix.removeprefix(".")
    if ending not in ("svg", "png"):
        raise DataError(f"{path}: expected a file name that ends in .svg or .png")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("pictures need matplotlib; install rgft[report]") from error
    figure = Figure(figsize=(5.2 * len(found), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = sorted({point.label for points in found.values() for point in points}, key=lambda x: (x != "rgft", x))
    for axes, (group, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for place, label in enumerate(labels):
            own = [point for point in points if point.label == label]
            if own:
                axes.errorbar(
                    [point.cost for point in own], [point.quality for point in own],
                    yerr=[point.error or 0.0 for point in own], label=label, color=f"C{place % 10}",
                    marker="osD^v<>*PX"[place % 10], linewidth=2.0 if label == "rgft" else 0.8, capsize=2.0,
                )  # fmt: skip
        best = [point for point in points if point.is_on_frontier]
        axes.step([p.cost for p in best], [p.quality for p in best], where="post", color="0.7", zorder=0, linewidth=4.0)
        axes.set_xscale("log")
        if against == "flops":
            axes.set_xlim(0.04, 1.2)
            axes.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(_COSTS[against])
        axes.set_ylabel(f"test {metric}")
        axes.set_title(group.title, fontsize=9)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(cast("IO[bytes]", file), format=ending, dpi=150)
    return path
