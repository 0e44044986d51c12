"""The picture of an error map over time: components × probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from rgft.errors import DataError
from rgft.telemetry.atomic_write import atomic_file
from rgft.telemetry.heat_map import show_error_map


def draw_error_map(history: Sequence[tuple[int, Mapping[str, float]]], path: Path) -> Path:
    """Draws what each component scored at each probe, and writes it as PNG (aside, then renamed); see `show_error_map`.

    Args:
        history: (step, component → score) of each probe, in order; components in forward order.
        path: of the picture.

    Returns:
        `path`.

    Raises:
        DataError: there are no probes, or matplotlib (the extra `report`) is missing.
    """
    if not history:
        raise DataError(
            "an error map over time needs at least one probe, found none; the run was too short for its share"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("pictures need matplotlib; install rgft[report]") from error

    count = len({name for _, scores in history for name in scores})
    figure = Figure(figsize=(1.6 + 0.7 * len(history) + 2.4, 1.2 + 0.28 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = show_error_map(axes, [(str(step), scores) for step, scores in history])
    axes.set_xlabel("probe before step")
    axes.set_title("Where the model still learns: score per component", fontsize=9)
    bar = figure.colorbar(image, ax=axes, format="%.0e")
    bar.set_label("decrease of the loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(cast("IO[bytes]", file), format="png", dpi=150)
    return path
