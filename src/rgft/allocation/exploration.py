"""Stability of a mask: hysteresis against flapping, exploration against parts that never return."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from rgft.allocation.base import Mask, Situation
from rgft.allocation.selection import (
    CandidateMask,
    depends_on_map,
    observations_needed,
    previously_on,
    require_at_least,
    require_fraction,
)
from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Around(CandidateMask):
    """A mask that another one is wrapped in: it needs and sees what that one does."""

    mask: Mask

    @property
    def candidates_only(self) -> bool:
        return isinstance(self.mask, CandidateMask) and self.mask.candidates_only

    @property
    def needs_map(self) -> bool:
        return depends_on_map(self.mask)

    @property
    def min_observations(self) -> int:
        return observations_needed(self.mask)


@dataclass(frozen=True, kw_only=True)
class Hysteresis(_Around):
    """Another mask, in which what is on has an advantage: a component changes state only when it is clearly better.

    The inner mask decides on a map in which the scores of components that are on count E_k + margin·|E_k|. So a
    newcomer must beat an incumbent by that factor, and an exact sparsity stays exact. Without a plan in force, or once
    every `settle` steps, the inner mask decides alone: a small but lasting difference is followed too, at most once in
    that time.

    Attributes:
        mask: the mask to steady.
        margin: relative advantage of what is on, ≥ 0.
        settle: steps after which the plain mask decides once; None never.
    """

    name: ClassVar[str] = "hysteresis"
    margin: float = 0.1
    settle: int | None = None

    def __post_init__(self) -> None:
        require_at_least("mask.margin", self.margin, 0.0)
        if self.settle is not None:
            require_at_least("mask.settle", self.settle, 1)

    def active(self, situation: Situation) -> frozenset[str]:
        previous = situation.previous
        if previous is None or (self.settle and situation.step // self.settle > previous.step // self.settle):
            return self.mask.active(situation)
        incumbents = previously_on(situation)
        averages = {
            name: average + self.margin * abs(average) if name in incumbents else average
            for name, average in situation.error_map.averages.items()
        }
        return self.mask.active(replace(situation, error_map=replace(situation.error_map, averages=averages)))


@dataclass(frozen=True, kw_only=True)
class Exploring(_Around):
    """Another mask, with a rotating share of what it leaves off put on.

    Components are numbered; with G = ⌈1/share⌉ groups, those whose number is the decision's modulo G are on. A
    component that the inner mask never takes is therefore on once in any G consecutive decisions, however the others
    change. Putting on a component far below lowers the cut, and dX is paid down to it: `keep_cut` explores only at or
    above the inner mask's lowest component (then the probes alone look below).

    Attributes:
        mask: the mask to widen.
        share: share of the off components that is on per decision, in (0, 1].
        every: steps between decisions; the decision's number is step // every.
        keep_cut: never explore below the inner mask's cut.
    """

    name: ClassVar[str] = "exploring"
    share: float = 0.1
    every: int = 1
    keep_cut: bool = False

    def __post_init__(self) -> None:
        require_fraction("mask.share", self.share)
        require_at_least("mask.every", self.every, 1)

    def active(self, situation: Situation) -> frozenset[str]:
        chosen = self.mask.active(situation)
        groups = math.ceil(round(1.0 / self.share, 9))
        turn = (situation.step // self.every) % groups
        floor = min((c.depth for c in situation.components if c.name in chosen), default=0) if self.keep_cut else 0
        explored = {c.name for i, c in enumerate(situation.components) if i % groups == turn and c.depth >= floor}
        return chosen | explored


def steadied(
    mask: Mask,
    *,
    margin: float = 0.0,
    settle: int | None = None,
    exploration: float = 0.0,
    every: int = 1,
    keep_cut: bool = False,
) -> Mask:
    """`mask` with hysteresis (when margin > 0) and then exploration (when exploration > 0) around it."""
    if settle is not None and margin <= 0.0:
        raise ConfigError(f"mask.settle: has no effect without a margin; found settle={settle}, margin={margin}")
    steady = Hysteresis(mask=mask, margin=margin, settle=settle) if margin > 0.0 else mask
    if exploration <= 0.0:
        return steady
    return Exploring(mask=steady, share=exploration, every=every, keep_cut=keep_cut)
