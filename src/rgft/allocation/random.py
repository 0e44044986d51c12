"""The control: the same budget, spent on components drawn by lot."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import CandidateMask, require_fraction, share_of
from rgft.allocation.turns import require_stretch, turn
from rgft.errors import ConfigError

T = TypeVar("T")


def generator(seed: int, draw: int, label: str) -> random.Random:
    """A generator that depends on nothing but its arguments: equal on all ranks, and after a resume."""
    digest = hashlib.sha256(f"rgft/{label}/{seed}/{draw}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8]))


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """`items` in random order; from `random()` alone, whose sequence Python keeps between versions."""
    keys = [rng.random() for _ in items]
    return [items[position] for position in sorted(range(len(items)), key=keys.__getitem__)]


@dataclass(frozen=True, kw_only=True)
class RandomMask(CandidateMask):
    """Components drawn by lot, whatever the map says.

    With `by="components"` ⌈q · K⌉ of them. With `by="flops"` a random order is walked, and each component is taken
    that keeps the step within q × the FLOPs of the step with everything on, dX down to the lowest one included: the
    control for a policy that spends the same. Needs `Situation.costs`; if not even one component fits, the cheapest is
    taken.

    Attributes:
        q: share, in (0, 1].
        by: of what.
        every: steps between draws, or a share of the run.
    """

    name: ClassVar[str] = "random"
    needs_map: ClassVar[bool] = False
    q: float = 0.5
    by: Literal["components", "flops"] = "components"
    every: float = 1

    def __post_init__(self) -> None:
        require_fraction("mask.q", self.q)
        require_stretch("mask.every", self.every)
        if self.by not in ("components", "flops"):
            raise ConfigError(f"mask.by: expected 'components' or 'flops', found {self.by!r}")

    @property
    def candidates_only(self) -> bool:
        return self.by == "components"

    def active(self, situation: Situation) -> frozenset[str]:
        names = [component.name for component in situation.components]
        draw = turn("mask.every", self.every, situation)
        order = shuffled(names, generator(situation.seed, draw, self.name))
        if self.by == "components":
            return frozenset(order[: share_of(self.q, len(order))])
        if situation.costs is None:
            raise ConfigError("mask.by: 'flops' needs a cost model, found none; use by='components'")
        costs, rows, tokens = situation.costs, situation.rows, situation.tokens

        def flops(active: list[str]) -> float:
            return costs.step_flops(active, rows=rows, tokens=tokens).total

        limit = self.q * flops(names)
        taken: list[str] = []
        for name in order:
            if flops([*taken, name]) <= limit:
                taken.append(name)
        return frozenset(taken or [min(order, key=lambda name: flops([name]))])
