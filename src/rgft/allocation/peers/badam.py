"""BAdam: one block after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
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
from rgft.allocation.turns import in_steps
from rgft.components import Component


@dataclass(frozen=True, kw_only=True)
class BAdam(SelectionPolicy):
    """Block coordinate descent: one block is on for K steps, then the next, in cycles over all blocks.

    Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models", NeurIPS 2024
    (arXiv:2404.02827), algorithm 1. Blocks are what lies before the layers, each layer, what runs after them. With
    order `"random"` every cycle has its own order. Independent of the error map. Outside a plan: BAdam restarts Adam
    (moments and step count) and drops the old block's state at each switch (`moments: reset`).

    Attributes:
        every: K, steps per block.
        cycles: of the run over all blocks, in place of `every`; None: as `every` says. A share of the run would not do:
            blocks are of all prices, and how many steps a run has follows from them.
        order: of the blocks in a cycle.
        embeddings: whether what lies before the layers is a block; not so in its code unless asked for
            (`include_embedding`).
        always_on: kinds or names that train beside every block, such as a freshly made classifier (`active_modules`).
    """

    name: ClassVar[str] = "badam"
    needs_map: ClassVar[bool] = False
    every: int = 50
    cycles: int | None = None
    order: str = "random"
    embeddings: bool = True
    always_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least("policy.every", self.every, 1)
        if self.cycles is not None:
            require_at_least("policy.cycles", self.cycles, 1)
        require_choice("policy.order", self.order, ("random", "ascending", "descending"))

    def active(self, situation: Situation) -> frozenset[str]:
        kept = matching(situation.components, self.always_on, setting="policy.always_on")
        found = blocks_of(situation.components, embeddings=self.embeddings)
        blocks = [block - kept for block in found if block - kept]
        if not blocks:
            return kept
        cycle, position = divmod(situation.step // self._every(situation, blocks), len(blocks))
        if self.order == "random":
            blocks = shuffled(blocks, generator(situation.seed, cycle, self.name))
        return kept | (blocks[-1 - position] if self.order == "descending" else blocks[position])

    def _every(self, situation: Situation, blocks: Sequence[frozenset[str]]) -> int:
        """K: as it is set, or so that the steps that the run pays for are as many cycles."""
        if self.cycles is None or situation.step == 0:
            return self.every
        return in_steps("policy.cycles", 1.0 / (self.cycles * len(blocks)), steps_in_turn(situation, blocks))


def steps_in_turn(situation: Situation, sets: Sequence[frozenset[str]]) -> int | None:
    """How many steps the run pays for when these sets are on in turn; None: its length is not known."""
    steps, costs = situation.total_steps, situation.costs
    if steps is None or costs is None:
        return steps

    def flops(names: Collection[str]) -> float:
        return costs.step_flops(names, rows=situation.rows, tokens=situation.tokens).total

    paid = steps * flops([c.name for c in situation.components]) / fmean(map(flops, sets))
    return int(min(paid, situation.steps_in_data or paid))


def blocks_of(components: tuple[Component, ...], *, embeddings: bool = True) -> list[frozenset[str]]:
    """What lies before the layers (if asked for), each layer, what runs after: names, in forward order."""
    layers = [frozenset(component.name for component in members) for members in by_layer(components).values()]
    after = after_layers(components)
    before = frozenset(component.name for component in components).difference(after, *layers)
    return [block for block in (*([before] if embeddings else []), *layers, after) if block]
