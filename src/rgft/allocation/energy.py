"""The fewest components that hold a given share of the squared error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import CandidateMask, observed_scores, ranking, require_fraction, unobserved


@dataclass(frozen=True, kw_only=True)
class Energy(CandidateMask):
    """The smallest set with Σ_on E_k² ≥ ρ Σ E_k². Negative scores count as 0; without any energy all are on.

    With E_k = ‖∇_k L‖ (signal `grad_norm`, p 2, raw), ρ is the captured share ‖m∘∇L‖²/‖∇L‖² of the descent bound.

    Attributes:
        rho: ρ, in (0, 1].
    """

    name: ClassVar[str] = "energy"
    rho: float = 0.9

    def __post_init__(self) -> None:
        require_fraction("mask.rho", self.rho)

    def active(self, situation: Situation) -> frozenset[str]:
        scores = {name: max(0.0, score) for name, score in observed_scores(situation).items()}
        largest = max(scores.values(), default=0.0)
        if largest <= 0.0:
            return frozenset(component.name for component in situation.components)
        energies = {name: (score / largest) ** 2 for name, score in scores.items()}
        needed = self.rho * math.fsum(energies.values())
        kept: list[str] = []
        for name in ranking(energies):
            if math.fsum(energies[k] for k in kept) >= needed:
                break
            kept.append(name)
        return unobserved(situation) | frozenset(kept)
