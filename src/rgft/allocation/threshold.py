"""Masks that keep the components with the highest scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rgft.allocation.base import Situation
from rgft.allocation.selection import (
    CandidateMask,
    observed_groups,
    observed_scores,
    ranking,
    require_fraction,
    share_of,
    unobserved,
)
from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Threshold(CandidateMask):
    """Proposal A: on while E_k > τ.

    Attributes:
        tau: τ, in the units of the signal.
    """

    name: ClassVar[str] = "threshold"
    tau: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.tau):
            raise ConfigError(f"mask.tau: expected a finite number, found {self.tau}")

    def active(self, situation: Situation) -> frozenset[str]:
        passed = {name for name, score in observed_scores(situation).items() if score > self.tau}
        return unobserved(situation) | passed


@dataclass(frozen=True, kw_only=True)
class TargetSparsity(CandidateMask):
    """Proposal A: the threshold is put where a given share is off.

    ⌊fraction · K⌋ of the K observed components are off: of each layer, or of the whole model. With `scope="layer"`
    what belongs to no layer is left on, and a layer that is one component is never off: use a finer granularity, or
    `scope="global"`.

    Attributes:
        fraction: share that is off, in [0, 1].
        scope: where the share is taken.
    """

    name: ClassVar[str] = "target_sparsity"
    fraction: float = 0.5
    scope: Literal["layer", "global"] = "layer"

    def __post_init__(self) -> None:
        require_fraction("mask.fraction", self.fraction, zero=True)
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"mask.scope: expected 'layer' or 'global', found {self.scope!r}")

    def active(self, situation: Situation) -> frozenset[str]:
        off: set[str] = set()
        for scores in observed_groups(situation, self.scope):
            off.update(ranking(scores)[share_of(1.0 - self.fraction, len(scores)) :])
        return frozenset(c.name for c in situation.components if c.name not in off)


@dataclass(frozen=True, kw_only=True)
class TopFraction(CandidateMask):
    """Proposal B: the ⌈P · K⌉ of the K observed components with the highest scores.

    Attributes:
        fraction: P, in (0, 1].
    """

    name: ClassVar[str] = "top_fraction"
    fraction: float = 0.5

    def __post_init__(self) -> None:
        require_fraction("mask.fraction", self.fraction)

    def active(self, situation: Situation) -> frozenset[str]:
        scores = observed_scores(situation)
        return unobserved(situation) | frozenset(ranking(scores)[: share_of(self.fraction, len(scores))])
