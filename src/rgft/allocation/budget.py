"""The budget mask: how deep to cut, given what the run may still spend.

A run that trains only what lies above a cut affords more steps for the same FLOPs. What it loses and what it gains are
measured, not assumed. With r_k the generalising decrease of component k per step (what carries over to other batches)
and h_k its same-batch decrease, the excess over h of r is what a step memorises:

    bias(c)     = (1 − Σ_{k≥c} r_k / Σ_k r_k)²            signal that the cut puts out of reach
    variance(c) = (Σ_{k≥c} (h_k − r_k) / n_c) / (Σ_k (h_k − r_k) / n_0)   noise of the steps, averaged over n_c of them
    cost(c)     = bias(c) + λ · variance(c)

with n_c the number of steps that the FLOPs left buy at cut c. The cut with the lowest cost is taken. A linear rate per
FLOP would take everything (early-stopped full fine-tuning), a bare ratio the classifier alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Mask, Situation
from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CutChoice:
    """One candidate: the FLOPs of a step, how many steps are left, and the two terms of its cost."""

    cut: int
    step_flops: float
    steps: float
    bias: float
    variance: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class BudgetMask(Mask):
    """Everything above the best cut is on.

    Attributes:
        noise_weight: λ, the weight of variance against bias.
        hysteresis: a new cut must lower the cost by this share to replace the one in force.
        frozen_fraction: fixes the cut by hand: the share of layers below it.
    """

    name: ClassVar[str] = "budget"
    noise_weight: float = 1.0
    hysteresis: float = 0.1
    frozen_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.frozen_fraction is not None and not 0.0 <= self.frozen_fraction <= 1.0:
            raise ConfigError(f"mask.frozen_fraction: expected 0 <= frozen_fraction <= 1, found {self.frozen_fraction}")
        if self.noise_weight < 0.0:
            raise ConfigError(f"mask.noise_weight: expected >= 0, found {self.noise_weight}")

    def active(self, situation: Situation) -> frozenset[str]:
        cut = self.cut(situation)
        return frozenset(component.name for component in situation.components if component.depth >= cut)

    def cut(self, situation: Situation) -> int:
        """The depth to cut at."""
        top = max(component.depth for component in situation.components)
        if self.frozen_fraction is not None:
            layers = top - 1 if any(c.layer is None and c.depth == top for c in situation.components) else top
            frozen = round(self.frozen_fraction * layers)
            return frozen + 1 if frozen else 0
        choices = self.choices(situation)
        if not choices:
            return situation.previous.cut if situation.previous else 0
        best = min(choices, key=lambda choice: (choice.cost, choice.cut))
        if situation.previous is not None and situation.previous.cut:
            kept = next((choice for choice in choices if choice.cut == situation.previous.cut), None)
            if kept is not None and best.cost > kept.cost * (1.0 - self.hysteresis):
                return kept.cut
        return best.cut

    def choices(self, situation: Situation) -> list[CutChoice]:
        """All candidate cuts with their costs; empty until the maps and the cost model say something."""
        signal = {name: max(0.0, value) for name, value in situation.error_map.values().items()}
        total = sum(signal.values())
        if situation.costs is None or situation.flops_left is None or total <= 0.0:
            return []
        same = situation.same_batch_map.values() if situation.same_batch_map else {}
        noise = {name: max(0.0, same.get(name, value) - value) for name, value in signal.items()}
        depths = sorted({component.depth for component in situation.components})
        rows: list[tuple[int, float, float, float]] = []
        for cut in depths:
            above = [c.name for c in situation.components if c.depth >= cut]
            flops = situation.costs.step_flops(above, rows=situation.rows, tokens=situation.tokens).total
            rows.append((cut, flops, sum(signal.get(n, 0.0) for n in above), sum(noise.get(n, 0.0) for n in above)))
        reference = rows[0][3] * rows[0][1]
        choices = []
        for cut, flops, reached, noisy in rows:
            bias = (1.0 - reached / total) ** 2
            variance = noisy * flops / reference if reference > 0.0 else flops / rows[0][1]
            choices.append(
                CutChoice(
                    cut=cut,
                    step_flops=flops,
                    steps=situation.flops_left / flops,
                    bias=bias,
                    variance=variance,
                    cost=bias + self.noise_weight * variance,
                )
            )
        return choices
