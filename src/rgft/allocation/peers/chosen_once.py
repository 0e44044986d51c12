"""Selections by score that are made once, or renewed now and then: FISH Mask, GPS, SIFT, GRFT, LIFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import (
    SelectionPolicy,
    observed_groups,
    outside_layers,
    previously_on,
    ranking,
    require_at_least,
    require_choice,
    require_fraction,
    share_of,
    unobserved,
)


@dataclass(frozen=True, kw_only=True)
class FIMStatic(SelectionPolicy):
    """The top share of components by Fisher information, chosen from the first complete map and then fixed.

    Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH Mask), NeurIPS 2021 (arXiv:2111.09839), which
    chooses single weights; signal `fisher`. Until every component has been observed, the unobserved are on and the
    choice among the others stays open. The plan in force is the memory: a complete choice is known by its size (so at
    a share near 1 the last partial one may pass for it). Fixed for good, by design. Outside a plan nothing.

    Attributes:
        fraction: share of components on, in (0, 1].
        scope: take the share of the whole model, or of each layer with everything outside the layers on.
        every: steps after which the choice is renewed; None: never.
    """

    name: ClassVar[str] = "fim_static"
    fraction: float = 0.1
    scope: str = "global"
    every: int | None = None

    def __post_init__(self) -> None:
        require_fraction("policy.fraction", self.fraction)
        require_choice("policy.scope", self.scope, ("global", "layer"))
        if self.every is not None:
            require_at_least("policy.every", self.every, 1)

    def active(self, situation: Situation) -> frozenset[str]:
        fresh = self.choice(situation)
        before, previous = previously_on(situation), situation.previous
        if previous is None or unobserved(situation) or len(before) != len(fresh):
            return fresh
        due = self.every is not None and situation.step // self.every > previous.step // self.every
        return fresh if due else before

    def choice(self, situation: Situation) -> frozenset[str]:
        """What would be chosen from the present map."""
        chosen = set(unobserved(situation))
        for scores in observed_groups(situation, self.scope):
            chosen.update(ranking(scores)[: share_of(self.fraction, len(scores))])
        return frozenset(chosen) | (outside_layers(situation.components) if self.scope == "layer" else frozenset())


@dataclass(frozen=True, kw_only=True)
class GPS(FIMStatic):
    """The top share of each layer by |g|, chosen once: GPS at component granularity.

    Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning", CVPR 2024 (arXiv:2312.10136), which
    takes the weights with the largest gradient of each neuron (of a supervised contrastive loss); signal `grad_norm`.
    """

    name: ClassVar[str] = "gps"
    scope: str = "layer"


@dataclass(frozen=True, kw_only=True)
class SIFT(FIMStatic):
    """The top share of the model by |g|, chosen once: SIFT at component granularity.

    Song et al., "Sparse is Enough in Fine-tuning Pre-trained Large Language Models", ICML 2024 (arXiv:2312.11875),
    which takes single weights by the gradients of the first steps; signal `grad_norm`.
    """

    name: ClassVar[str] = "sift"


@dataclass(frozen=True, kw_only=True)
class GRFT(FIMStatic):
    """The top share of each layer by the sum of squared gradients, chosen once: GRFT's rows or columns.

    "Gradient-based Fine-Tuning through Pre-trained Model Regularization" (GRFT), 2025 (arXiv:2507.00016). A head or a
    neuron block *is* a range of rows of its input projections and of columns of its output projection; single rows need
    a user's granularity. Signal `grad_norm`, p 2, raw. Outside a plan: GRFT adds a penalty on the distance to the
    pre-trained weights.
    """

    name: ClassVar[str] = "grft"
    scope: str = "layer"


@dataclass(frozen=True, kw_only=True)
class LIFT(FIMStatic):
    """The top share of each layer by magnitude after low-rank approximation, renewed every 100 steps.

    Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
    Supervised Fine-Tuning", ICML 2025 (arXiv:2506.00772), which takes the top 5 % single weights of each matrix; signal
    `low_rank_magnitude`. Outside a plan: LIFT carries the moments of weights that stay and drops the others (`moments:
    reset`).
    """

    name: ClassVar[str] = "lift"
    fraction: float = 0.05
    scope: str = "layer"
    every: int | None = 100
