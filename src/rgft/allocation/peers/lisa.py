"""LISA: a few random layers at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.random import generator, shuffled
from rgft.allocation.selection import (
    OUTSIDE,
    SelectionPolicy,
    beside_layers,
    by_layer,
    require_at_least,
    require_choice,
)
from rgft.allocation.turns import require_stretch, turn


@dataclass(frozen=True, kw_only=True)
class LISA(SelectionPolicy):
    """γ layers drawn uniformly every K steps; embeddings and head (all outside the layers) always on.

    Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", NeurIPS
    2024 (arXiv:2403.17919), algorithm 1 with equal weights. Independent of the error map. Because the embeddings train,
    dX runs to the bottom at every step: `outside="after"` leaves them off and lets the cut rise to the lowest layer
    drawn. Outside a plan: LISA's code builds a new optimizer state at each draw (`moments: reset`).

    Attributes:
        layers: γ, at most the number of layers is used.
        every: K, steps between draws, or a share of the run.
        outside: `"all"` as published; `"after"`: only what runs after the layers.
    """

    name: ClassVar[str] = "lisa"
    needs_map: ClassVar[bool] = False
    layers: int = 2
    every: float = 20
    outside: str = "all"

    def __post_init__(self) -> None:
        require_at_least("policy.layers", self.layers, 1)
        require_stretch("policy.every", self.every)
        require_choice("policy.outside", self.outside, OUTSIDE)

    def active(self, situation: Situation) -> frozenset[str]:
        groups = by_layer(situation.components)
        rng = generator(situation.seed, turn("policy.every", self.every, situation), self.name)
        drawn = shuffled(list(groups), rng)
        chosen = {component.name for layer in drawn[: self.layers] for component in groups[layer]}
        return beside_layers(situation.components, self.outside) | chosen
