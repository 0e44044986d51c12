"""A picture of E over time: a panel for each study or contender, components × looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import IO, TYPE_CHECKING, cast

from rgft.bench.map_study.history import History
from rgft.errors import DataError
from rgft.telemetry.atomic_write import atomic_file
from rgft.telemetry.heat_map import show_error_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3


def figure(found: Sequence[History]) -> Figure:
    """Panels in rows of three, the mean over seeds in each; each has colours of its own.

    Raises:
        DataError: matplotlib (the extra `report`) is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("pictures need matplotlib; install rgft[report]") from error
    columns = min(COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    height = 1.2 + 0.22 * max(len(history.components) for history in found)
    made = Figure(figsize=(5.0 * columns, height * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(made)
    panels = made.subplots(rows, columns, squeeze=False).ravel()
    for axes, history in zip(panels, found, strict=False):
        looks = [
            (f"{step:.0f}", {name: mean(values[place]) for name, values in history.components.items()})
            for place, step in enumerate(history.steps)
        ]
        bar = made.colorbar(show_error_map(axes, looks), ax=axes, format="%.0e")
        bar.ax.tick_params(labelsize=7)
        axes.set_xlabel("step of the look", fontsize=8)
        axes.set_title(history.title.replace(": ", "\n", 1), fontsize=8)
    for axes in panels[len(found) :]:
        axes.remove()
    return made


def draw(found: Sequence[History], path: Path) -> Path:
    """The picture as SVG or PNG, by the path's ending (written aside, then renamed).

    Raises:
        DataError: another ending, or as `figure`.
    """
    ending = path.suffix.removeprefix(".")
    if ending not in ("svg", "png"):
        raise DataError(f"{path}: expected a file name that ends in .svg or .png")
    made = figure(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        made.savefig(cast("IO[bytes]", file), format=ending)
    return path
