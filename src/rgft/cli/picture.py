"""The picture of an error map over time: components × probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from rgft.errors import DataError
from rgft.telemetry.atomic_write import atomic_file


def draw_error_map(history: Sequence[tuple[int, Mapping[str, float]]], path: Path) -> Path:
    """Draws what each component scored at each probe, and writes it as PNG (aside, then renamed).

    Colours are on a symmetric logarithmic scale: scores of a classifier and of a layer differ by orders of magnitude,
    and may be negative (a step that only memorises).

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
        from matplotlib.colors import SymLogNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise DataError("pictures need matplotlib; install rgft[report]") from error

    names = list(dict.fromkeys(name for _, scores in history for name in scores))
    grid = [[scores.get(name, float("nan")) for _, scores in history] for name in names]
    largest = max((abs(value) for row in grid for value in row if value == value), default=0.0) or 1.0
    figure = Figure(figsize=(1.6 + 0.7 * len(history) + 2.4, 1.2 + 0.28 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(
        grid, aspect="auto", cmap="RdBu_r", norm=SymLogNorm(largest * 1e-2, vmin=-largest, vmax=largest),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(history)), [str(step) for step, _ in history], fontsize=7)
    axes.set_xlabel("probe before step")
    axes.set_title("Where the model still learns: score per component", fontsize=9)
    bar = figure.colorbar(image, ax=axes, format="%.0e")
    bar.set_label("decrease of the loss", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(cast("IO[bytes]", file), format="png", dpi=150)
    return path
