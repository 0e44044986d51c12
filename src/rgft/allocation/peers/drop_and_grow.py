"""ID³ and SpIEL: masks that grow, or exchange members, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import (
    SelectionPolicy,
    observed_scores,
    previously_on,
    ranking,
    require_at_least,
    require_fraction,
    share_of,
    unobserved,
)


@dataclass(frozen=True, kw_only=True)
class ID3(SelectionPolicy):
    """Incremental unmasking: what is on stays on, and the best of the rest join at an even pace.

    Agarwal et al., "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models" (ID³), TACL
    2025 (arXiv:2408.14470). At step t, ⌈fraction · K · min(1, (t+1)/unmask_steps)⌉ of the K observed components are on;
    its signal is `grad_over_weight`. Joining is for good, by design. Outside a plan nothing; the published code
    computes the whole dW and masks it.

    The plan in force is the memory. One that holds more than its own step allowed (the first, when nothing had been
    observed and all was on) counts by its best members only.

    Attributes:
        fraction: share of components on in the end.
        unmask_steps: steps until then.
    """

    name: ClassVar[str] = "id3"
    fraction: float = 0.3
    unmask_steps: int = 100

    def __post_init__(self) -> None:
        require_fraction("policy.fraction", self.fraction)
        require_at_least("policy.unmask_steps", self.unmask_steps, 1)

    def quota(self, step: int, count: int) -> int:
        """Number of `count` components that may be on at `step`."""
        return share_of(self.fraction * min(1.0, (step + 1) / self.unmask_steps), count)

    def active(self, situation: Situation) -> frozenset[str]:
        order = ranking(observed_scores(situation))
        before = previously_on(situation)
        allowed = self.quota(situation.previous.step, len(order)) if situation.previous else 0
        kept = [name for name in order if name in before][:allowed]
        rest = [name for name in order if name not in kept]
        joining = max(0, self.quota(situation.step, len(order)) - len(kept))
        return unobserved(situation) | frozenset(kept) | frozenset(rest[:joining])


@dataclass(frozen=True, kw_only=True)
class SpIEL(SelectionPolicy):
    """Drop and grow: a fixed number on; at each decision the weakest of them make room for the strongest of the rest.

    Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models" (SpIEL), 2024 (arXiv:2401.16405). There what
    changed least is dropped and what has the largest gradient grows (SpIEL-AG). A component's map holds one score, so
    both look at it here (use `grad_norm`): an exchange takes place only when it raises the score, or it would drop what
    it should keep. The share exchanged falls to 0 along the run as a cosine, as in RigL (Evci et al. 2020); without a
    known run length it stays. Outside a plan: SpIEL zeroes the moments of what grows (`moments: reset`) and reverts
    what it drops to its pre-trained value, which a plan does not do.

    Attributes:
        density: share of the observed components on.
        churn: share of the ones on that may be exchanged at the first decision.
    """

    name: ClassVar[str] = "spiel"
    density: float = 0.3
    churn: float = 0.2

    def __post_init__(self) -> None:
        require_fraction("policy.density", self.density)
        require_fraction("policy.churn", self.churn)

    def active(self, situation: Situation) -> frozenset[str]:
        scores = observed_scores(situation)
        order = ranking(scores)
        count = share_of(self.density, len(order))
        before = previously_on(situation)
        members = [name for name in order if name in before]
        if len(members) != count:  # no such plan yet, or one made before all was observed
            members = order[:count]
        others = [name for name in order if name not in members]
        for newcomer in others[: self.exchanges(situation, count)]:
            weakest = members[-1]
            if scores[newcomer] <= scores[weakest]:
                break
            members = [newcomer, *members[:-1]]
        return unobserved(situation) | frozenset(members)

    def exchanges(self, situation: Situation, count: int) -> int:
        """How many of `count` may be exchanged now."""
        progress = min(1.0, situation.step / situation.total_steps) if situation.total_steps else 0.0
        return math.floor(round(self.churn * count * 0.5 * (1.0 + math.cos(math.pi * progress)), 9))
