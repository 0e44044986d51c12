"""What a measurement hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a figure shall be.

    Attributes:
        figure: its name.
        at_most, at_least: bounds; None: none on that side.
    """

    figure: str
    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, figures: Mapping[str, Any]) -> bool:
        value = figures[self.figure]
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement.

    Attributes:
        config: what was measured.
        figures: medians where there were repeats; names end in their unit, or say of what they are a ratio.
        targets: of the figures.
        warm_up: repeats that were made first and not timed.
        repeats: timed ones.
    """

    config: Mapping[str, Any]
    figures: Mapping[str, Any]
    targets: tuple[Target, ...]
    warm_up: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """A dictionary fit for JSON, which says of each target whether it is met."""
        targets = [{**asdict(target), "is_met": target.is_met(self.figures)} for target in self.targets]
        return {**asdict(self), "targets": targets}
