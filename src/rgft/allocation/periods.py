"""How often a component is updated: proposal B's "more frequent" updates where the error is larger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Period, Situation
from rgft.allocation.selection import observed_scores, ranking, require_at_least


@dataclass(frozen=True, kw_only=True)
class EveryStep(Period):
    """Every component at every step."""

    name: ClassVar[str] = "every_step"
    needs_map: ClassVar[bool] = False

    def periods(self, situation: Situation) -> Mapping[str, int]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Proportional(Period):
    """Update frequency proportional to the error: n_k = max_j E_j / E_k, rounded, at most `longest`.

    Proposal B asks for more frequent updates where the error is larger and gives no formula; this is its plainest
    reading. A score ≤ 0 gives `longest`; when no score is positive, every period is 1. Powers of two make the off
    steps of different components fall together, so that the cut can rise at them.

    Attributes:
        longest: largest period.
        powers_of_two: round down to a power of two.
    """

    name: ClassVar[str] = "proportional"
    longest: int = 8
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        require_at_least("period.longest", self.longest, 1)

    def periods(self, situation: Situation) -> Mapping[str, int]:
        scores = observed_scores(situation)
        largest = max(scores.values(), default=0.0)
        if largest <= 0.0:
            return {}
        return {name: self._period(largest, score) for name, score in scores.items()}

    def _period(self, largest: float, score: float) -> int:
        ratio = largest / score if score * self.longest > largest else float(self.longest)
        return 2 ** int(math.log2(ratio)) if self.powers_of_two else round(ratio)


@dataclass(frozen=True, kw_only=True)
class RankedPeriod(Period):
    """Period 1 for the best `1/levels` of the observed components by score, 2 for the next, then 4, and so on.

    Attributes:
        levels: number of equal groups.
    """

    name: ClassVar[str] = "ranked"
    levels: int = 3

    def __post_init__(self) -> None:
        require_at_least("period.levels", self.levels, 1)

    def periods(self, situation: Situation) -> Mapping[str, int]:
        scores = observed_scores(situation)
        if len(set(scores.values())) < 2:
            return {}
        return {name: 2 ** (self.levels * rank // len(scores)) for rank, name in enumerate(ranking(scores))}
