"""Stretches of a run: so many steps each, or a share of the run."""

from __future__ import annotations

from rgft.allocation.base import Situation
from rgft.errors import ConfigError


def is_stretch(value: float) -> bool:
    """Whether value is a whole number of steps, or a share of the run below 1."""
    return 0.0 < value < 1.0 or (value >= 1 and value == int(value))


def require_stretch(setting: str, value: float) -> None:
    """Raises ConfigError unless value is one (`is_stretch`)."""
    if not is_stretch(value):
        raise ConfigError(
            f"{setting}: expected a number of steps (an integer >= 1) or a share of the run (between 0 and 1), found "
            f"{value}"
        )


def in_steps(setting: str, value: float, total: int | None) -> int:
    """A stretch in steps, at least one.

    Args:
        setting: its name.
        value: steps, or below 1 a share of the run.
        total: steps of the run; None: unknown.

    Raises:
        ConfigError: it is a share of a run of unknown length.
    """
    if value >= 1:
        return int(value)
    if total is None:
        raise ConfigError(
            f"{setting}: expected a number of steps, for the run's length is not known here; found the share {value}"
        )
    return max(1, int(value * total))


def turn(setting: str, every: float, situation: Situation, *, step: int | None = None) -> int:
    """In which stretch of `every` a step is, counted from 0; None: the situation's.

    A share is of `Situation.total_steps`, so that a run whose steps cost less than full ones has more stretches.
    """
    step = situation.step if step is None else step
    return step // in_steps(setting, every, situation.total_steps) if step else 0
