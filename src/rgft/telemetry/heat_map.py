"""An error map over time on the axes of a picture: components × looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def show_error_map(axes: Axes, history: Sequence[tuple[str, Mapping[str, float]]]) -> AxesImage:
    """Shows what each component scored at each look.

    Colours are on a symmetric logarithmic scale: scores of a classifier and of a layer differ by orders of magnitude,
    and may be negative (a step that only memorises).

    Args:
        axes: to draw on.
        history: (label, component → score) of each look, in order; components in forward order.
    """
    from matplotlib.colors import SymLogNorm

    names = list(dict.fromkeys(name for _, scores in history for name in scores))
    grid = [[scores.get(name, float("nan")) for _, scores in history] for name in names]
    largest = max((abs(value) for row in grid for value in row if value == value), default=0.0) or 1.0
    image = axes.imshow(
        grid, aspect="auto", cmap="RdBu_r", norm=SymLogNorm(largest * 1e-2, vmin=-largest, vmax=largest),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(history)), [label for label, _ in history], fontsize=7)
    return image
