"""HFT: a random half of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.random import generator, shuffled
from rgft.allocation.selection import SelectionPolicy, by_layer, outside_layers
from rgft.allocation.turns import require_stretch, turn


@dataclass(frozen=True, kw_only=True)
class HFT(SelectionPolicy):
    """Half of each layer's components, drawn by lot and redrawn every K steps; outside the layers all is on.

    Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025 (arXiv:2404.18466). There the half is taken
    of a layer's matrices, and redrawn per round of training; here of its components (two at block granularity). Of a
    layer with an odd number, the odd one is on in every other such layer, in random order, so that half is half over
    the model; at layer granularity that is a random half of the layers. Independent of the error map. Outside a plan
    nothing.

    Attributes:
        every: steps between draws, or a share of the run; None: one draw for the run, as in single-round fine-tuning.
    """

    name: ClassVar[str] = "hft"
    needs_map: ClassVar[bool] = False
    every: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None:
            require_stretch("policy.every", self.every)

    def active(self, situation: Situation) -> frozenset[str]:
        draw = turn("policy.every", self.every, situation) if self.every else 0
        rng = generator(situation.seed, draw, self.name)
        chosen = set(outside_layers(situation.components))
        odd = 0
        for members in shuffled(list(by_layer(situation.components).values()), rng):
            count = len(members) // 2
            if len(members) % 2:
                odd += 1
                count += odd % 2
            chosen.update(shuffled([component.name for component in members], rng)[:count])
        return frozenset(chosen)
