"""The budget mask: how deep to cut, given what the run may still spend.

A run that trains only what lies above a cut affords more steps for the same FLOPs. What it loses and what it gains are
measured, not assumed. With r_d the generalising decrease of all components of depth d (what a step gains on other
examples) and h_d their same-batch decrease, h_d − r_d is what a step merely memorises:

    bias(c)     = (1 − Σ_{d≥c} r_d / Σ_d r_d)²                                signal that the cut puts out of reach
    variance(c) = (Σ_{d≥c} (h_d − r_d) / n_c) / (Σ_d (h_d − r_d) / n_0)       noise of the steps, averaged over n_c
    cost(c)     = bias(c) + λ · variance(c)

over the layers and what runs before them (what runs after the last layer is on at every cut), n_c being the number of
steps that the FLOPs left buy at cut c, no more than the epochs have left. A cut of which they buy no step is out of
the question, but for the cheapest. The cut with the lowest cost is taken. A linear rate per FLOP would take
everything (early-stopped full fine-tuning), a bare ratio the classifier alone.

Scores are shrunk towards equal layers by their standard errors: a short run, whose scores are noise, decides by the
costs alone; a long one by what it measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Mask, Situation
from rgft.allocation.selection import after_layers
from rgft.allocation.shrinkage import shrunk
from rgft.error_map import ErrorMap
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
        spread: prior standard deviation of a layer's share, relative to the mean layer.
        hysteresis: a new cut must lower the cost by this share to replace the one in force.
        frozen_fraction: fixes the cut by hand: the share of layers below it.
    """

    name: ClassVar[str] = "budget"
    noise_weight: float = 1.0
    spread: float = 0.5
    hysteresis: float = 0.1
    frozen_fraction: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"mask.{key}: expected {expected}, found {value}"
            for key, expected, value, good in (
                ("noise_weight", "a number >= 0", self.noise_weight, self.noise_weight >= 0.0),
                ("spread", "a number >= 0", self.spread, self.spread >= 0.0),
                ("hysteresis", "0 <= hysteresis < 1", self.hysteresis, 0.0 <= self.hysteresis < 1.0),
                (
                    "frozen_fraction", "0 <= frozen_fraction <= 1", self.frozen_fraction,
                    self.frozen_fraction is None or 0.0 <= self.frozen_fraction <= 1.0,
                ),
            )
            if not good
        ]  # fmt: skip
        if problems:
            raise ConfigError(problems)

    def active(self, situation: Situation) -> frozenset[str]:
        cut = self.cut(situation)
        return frozenset(component.name for component in situation.components if component.depth >= cut)

    def cut(self, situation: Situation) -> int:
        """The depth to cut at."""
        if self.frozen_fraction is not None:
            frozen = round(self.frozen_fraction * max(_layer_depths(situation), default=0))
            return frozen + 1 if frozen else 0
        choices = self.choices(situation)
        if not choices:
            return situation.previous.cut if situation.previous else 0
        best = min(choices, key=lambda choice: (choice.cost, choice.cut))
        if situation.previous is not None:
            kept = next((choice for choice in choices if choice.cut == situation.previous.cut), None)
            if kept is not None and best.cost > kept.cost * (1.0 - self.hysteresis):
                return kept.cut
        return best.cut

    def choices(self, situation: Situation) -> list[CutChoice]:
        """All candidate cuts with their costs; empty without a cost model, a budget or layers."""
        if situation.costs is None or situation.flops_left is None or not _layer_depths(situation):
            return []
        signal, noise = self._by_depth(situation)
        total, everything = sum(signal.values()), sum(noise.values())
        depths = sorted({component.depth for component in situation.components})
        rows: list[tuple[int, float, float]] = []
        for cut in depths:
            above = frozenset(c.name for c in situation.components if c.depth >= cut)
            flops = situation.costs.step_flops(above, rows=situation.rows, tokens=situation.tokens).total
            bought = situation.flops_left / flops
            limit = bought if situation.steps_left is None else situation.steps_left
            rows.append((cut, flops, max(1.0, min(bought, limit))))
        affordable = [row for row in rows if row[1] <= situation.flops_left]
        rows = affordable or [min(rows, key=lambda row: row[1])]
        all_steps = rows[0][2]
        choices = []
        for cut, flops, steps in rows:
            reached = sum(value for depth, value in signal.items() if depth >= cut)
            noisy = sum(value for depth, value in noise.items() if depth >= cut)
            bias, variance = (1.0 - reached / total) ** 2, (noisy / everything) * (all_steps / steps)
            cost = bias + self.noise_weight * variance
            choices.append(CutChoice(cut=cut, step_flops=flops, steps=steps, bias=bias, variance=variance, cost=cost))
        return choices

    def _by_depth(self, situation: Situation) -> tuple[dict[int, float], dict[int, float]]:
        """Shrunken signal r_d and noise h_d − r_d per depth; equal layers where nothing is known."""
        depths = _layer_depths(situation)
        values, errors = _summed(situation, situation.error_map)
        signal = self._shrunk(depths, values, errors)
        noise = dict(signal)
        if situation.same_batch_map is not None:
            same, same_errors = _summed(situation, situation.same_batch_map)
            both = [depth for depth in values if depth in same]
            noise = self._shrunk(
                depths,
                {d: same[d] - values[d] for d in both},
                {d: (errors[d] ** 2 + same_errors[d] ** 2) ** 0.5 for d in both},
            )
        return signal, noise

    def _shrunk(self, depths: list[int], values: Mapping[int, float], errors: Mapping[int, float]) -> dict[int, float]:
        observed = [values[depth] for depth in depths if depth in values]
        mean = sum(observed) / len(observed) if observed else 0.0
        if mean <= 0.0:  # no evidence that anything is learnt: all layers count alike
            return dict.fromkeys(depths, 1.0)
        layers = {str(d): values.get(d, mean) for d in depths}
        result = shrunk(layers, {str(d): errors.get(d) for d in depths}, mean=mean, spread=self.spread * mean)
        before = {
            str(d): value for d, value in values.items() if d not in depths
        }  # embeddings cost next to nothing and gain little: their prior is nothing
        result |= shrunk(before, {str(d): errors[int(d)] for d in values}, mean=0.0, spread=self.spread * mean)
        return {int(depth): max(0.0, value) for depth, value in result.items()}


def _layer_depths(situation: Situation) -> list[int]:
    return sorted({component.depth for component in situation.components if component.layer is not None})


def _summed(situation: Situation, error_map: ErrorMap) -> tuple[dict[int, float], dict[int, float]]:
    """Scores summed over the components of a depth, and the standard errors of the sums."""
    shared = after_layers(situation.components)
    sums: dict[int, float] = defaultdict(float)
    squares: dict[int, float] = defaultdict(float)
    for component in situation.components:
        value = error_map.value(component.name)
        if component.name not in shared and value is not None:
            error = error_map.standard_error(component.name)
            sums[component.depth] += value
            squares[component.depth] += float("inf") if error is None else error**2
    return dict(sums), {depth: square**0.5 for depth, square in squares.items()}
