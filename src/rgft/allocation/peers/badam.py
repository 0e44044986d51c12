"""BAdam: one block after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.random import generator, shuffled
from rgft.allocation.selection import (
    SelectionPolicy,
    after_layers,
    by_layer,
    matching,
    require_at_least,
    require_choice,
)
from rgft.components import Component


@dataclass(frozen=True, kw_only=True)
class BAdam(SelectionPolicy):
    """Block coordinate descent: one block is on for K steps, then the next, in cycles over all blocks.

    Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models", NeurIPS 2024
    (arXiv:2404.02827), algorithm 1. Blocks are those of its code: what lies before the layers, each layer, what runs
    after them. With order `"random"` every cycle has its own order. Independent of the error map. Outside a plan:
    BAdam restarts Adam (moments and step count) and drops the old block's state at each switch (`moments: reset`).

    Attributes:
        every: K, steps per block.
        order: of the blocks in a cycle.
        always_on: kinds or names that train beside every block, such as a freshly made classifier.
    """

    name: ClassVar[str] = "badam"
    needs_map: ClassVar[bool] = False
    every: int = 50
    order: str = "random"
    always_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least("policy.every", self.every, 1)
        require_choice("policy.order", self.order, ("random", "ascending", "descending"))

    def active(self, situation: Situation) -> frozenset[str]:
        kept = matching(situation.components, self.always_on, setting="policy.always_on")
        blocks = [block - kept for block in blocks_of(situation.components) if block - kept]
        if not blocks:
            return kept
        cycle, position = divmod(situation.step // self.every, len(blocks))
        if self.order == "random":
            blocks = shuffled(blocks, generator(situation.seed, cycle, self.name))
        return kept | (blocks[-1 - position] if self.order == "descending" else blocks[position])


def blocks_of(components: tuple[Component, ...]) -> list[frozenset[str]]:
    """What lies before the layers, each layer, what runs after: names, in forward order."""
    layers = [frozenset(component.name for component in members) for members in by_layer(components).values()]
    after = after_layers(components)
    before = frozenset(component.name for component in components).difference(after, *layers)
    return [block for block in (before, *layers, after) if block]
