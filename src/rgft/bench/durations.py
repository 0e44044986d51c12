"""How long runs take, as far as stored results tell, and what is left of a sitting's time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import inf
from statistics import mean
from typing import Any

from rgft.bench.experiment import Contender


class Durations:
    """What runs of an experiment take.

    Args:
        device: where runs are made; what others took says nothing.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._of_contender: dict[str, float] = {}
        self._of_budget: dict[float, list[float]] = {}

    def note(self, result: Mapping[str, Any]) -> None:
        """Counts a result in; those that diverged say nothing."""
        seconds = result.get("elapsed_seconds", result.get("seconds"))
        if seconds is None or result.get("device", "cpu") != self._device:
            return
        label = result["contender"]
        self._of_contender[label] = max(seconds, self._of_contender.get(label, 0.0))
        self._of_budget.setdefault(result["budget"], []).append(seconds)

    def expected(self, contender: Contender) -> float:
        """Seconds of a run: the contender's longest, else the mean at its budget, else 0."""
        at_budget = self._of_budget.get(contender.budget)
        return self._of_contender.get(contender.label, mean(at_budget) if at_budget else 0.0)


class TimeLeft:
    """A sitting's time, which begins now.

    Args:
        seconds: None: there is no end.

    Attributes:
        is_over: whether no further run may be begun.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = inf if seconds is None else time.perf_counter() + seconds
        self._is_first = True
        self._is_full = False

    @property
    def is_over(self) -> bool:
        return self._is_full or time.perf_counter() > self._end

    def allows(self, seconds: float) -> bool:
        """Whether a run that takes so long can be begun; one that cannot is the last that is asked about.

        The first is begun, however long it takes: else one that is longer than any sitting would never be made.
        """
        self._is_full = not self._is_first and time.perf_counter() + seconds > self._end
        self._is_first = False
        return not self._is_full
