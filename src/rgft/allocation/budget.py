"""The budget mask: how deep to cut, given what the run may still spend.

A run that trains only what lies above a cut affords more steps for the same FLOPs. What it loses and what it gains are
measured, not assumed. With r_d the generalising decrease of all components of depth d (what a step gains on other
examples):

    bias(c)     = (u_c · (1 − Σ_{d≥c} r_d / Σ_d r_d))^a    signal that the cut puts out of reach, and that is missed
    variance(c) = worth(0) / worth(c)                      noise of the steps, averaged over what they see
    cost(c)     = bias(c) + λ · variance(c)

over the layers and what runs before them (what runs after the last layer is on at every cut). The lowest layers are
missed least (a = 3), under a pre-trained head sooner than under a new one (a = 1.6). u_c is what a linear map of the
output of the layer just below the cut leaves unexplained of the targets before anything is trained (`rgft.readout`), 1
where that was not read: where frozen features tell the targets already, nothing below the cut need change
(docs/decisions/0025).

Of the n steps that the run's whole budget buys at cut c, those beyond one epoch of E see examples again, which bring
their own noise again, and count for less with each repetition (as in Muennighoff et al. 2023, arXiv:2305.16264,
equation 5, but for the first one, which counts for less than a new one from the start):

    worth = n  up to E,  then  E · (1 + R · (1 − exp(1 − n / E)))

So repetitions are worth at most R epochs: the more epochs a budget pays for, the less is cut; and decisions depend on
what was measured, not on how far the run is. A cut of which the FLOPs left buy no step is out of the question, but for
the cheapest. The cut with the lowest cost is taken. A linear rate per FLOP would take everything (early-stopped full
fine-tuning), a bare ratio the classifier alone. Measured against grids of fixed cuts: docs/decisions/0006.

Scores are shrunk towards equal layers by their uncertainty: a short run, whose scores are noise, decides by costs and
readout. A long one does by what it measured, where that makes a difference: early maps are top-heavy under a new
head, and deeper cuts that were better by a few hundredths were worse in the end (docs/decisions/0023).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rgft.allocation.base import Mask, Situation
from rgft.allocation.selection import after_layers
from rgft.allocation.shrinkage import shrunk
from rgft.error_map import ENOUGH, ErrorMap
from rgft.errors import ConfigError

#: a where nothing is said: under a new head, and under a pre-trained one (`model_defaults` knows which it is).
NEW_HEAD_EXPONENT, PRETRAINED_HEAD_EXPONENT = 3.0, 1.6
#: Share of the FLOPs for a readout, likewise. Of a pre-trained language model it would say that nothing is explained:
#: what its layers tell of the next token, its head uses already.
NEW_HEAD_READOUT, PRETRAINED_HEAD_READOUT = 0.08, 0.0


@dataclass(frozen=True, kw_only=True)
class CutChoice:
    """One candidate cut.

    Attributes:
        cut: its depth.
        step_flops: FLOPs of a step on examples that are not cached.
        steps: that the run's whole budget buys.
        worth: of these, in steps on new examples.
        bias, variance, cost: terms and sum.
    """

    cut: int
    step_flops: float
    steps: float
    worth: float
    bias: float
    variance: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class BudgetMask(Mask):
    """Everything above the best cut is on.

    Attributes:
        bias_exponent: a, how little is missed of what a cut puts out of reach; None: 3, of language models 1.6.
        noise_weight: λ, the weight of variance against bias.
        repetition: R, what a first repetition is worth, as a share of a new example; of all together, in epochs.
        spread: prior standard deviation of a layer's share, relative to the mean layer.
        hysteresis: a new cut must lower the cost by this share to replace the one in force; the first, that which is
            best without a map.
        frozen_fraction: fixes the cut by hand: the share of layers below it.
        readout: share of the run's FLOPs that a readout before the first step may take; 0: none. None: 0.08, of
            language models 0, whose own head has read their layers already.
    """

    name: ClassVar[str] = "budget"
    min_observations: ClassVar[int] = ENOUGH
    bias_exponent: float | None = None
    noise_weight: float = 1.0
    repetition: float = 0.7
    spread: float = 0.5
    hysteresis: float = 0.1
    frozen_fraction: float | None = None
    readout: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"mask.{key}: expected {expected}, found {value}"
            for key, expected, value, good in (
                (
                    "bias_exponent", "a number >= 1", self.bias_exponent,
                    self.bias_exponent is None or self.bias_exponent >= 1.0,
                ),
                ("noise_weight", "a number >= 0", self.noise_weight, self.noise_weight >= 0.0),
                ("repetition", "0 <= repetition <= 1", self.repetition, 0.0 <= self.repetition <= 1.0),
                ("spread", "a number >= 0", self.spread, self.spread >= 0.0),
                ("hysteresis", "0 <= hysteresis < 1", self.hysteresis, 0.0 <= self.hysteresis < 1.0),
                (
                    "readout", "0 <= readout < 1", self.readout,
                    self.readout is None or 0.0 <= self.readout < 1.0,
                ),
                (
                    "frozen_fraction", "0 <= frozen_fraction <= 1", self.frozen_fraction,
                    self.frozen_fraction is None or 0.0 <= self.frozen_fraction <= 1.0,
                ),
            )
            if not good
        ]  # fmt: skip
        if problems:
            raise ConfigError(problems)

    @property
    def readout_share(self) -> float:
        if self.frozen_fraction is not None:
            return 0.0
        return NEW_HEAD_READOUT if self.readout is None else self.readout

    def active(self, situation: Situation) -> frozenset[str]:
        cut = self.cut(situation)
        return frozenset(component.name for component in situation.components if component.depth >= cut)

    def cut(self, situation: Situation) -> int:
        """The depth to cut at."""
        if self.frozen_fraction is not None:
            frozen = round(self.frozen_fraction * max(_layer_depths(situation), default=0))
            return max(frozen + 1 if frozen else 0, situation.lowest_cut)
        choices = self.choices(situation)
        if not choices:
            return max(situation.previous.cut if situation.previous else 0, situation.lowest_cut)
        best, standing = _cheapest(choices), self._standing(situation)
        kept = next((choice for choice in choices if choice.cut == standing), None)
        if kept is not None and best.cost > kept.cost * (1.0 - self.hysteresis):
            return kept.cut
        return best.cut

    def _standing(self, situation: Situation) -> int:
        """The cut that another one has to better: the one in force; before there is any, what is best without a map."""
        if situation.previous is not None:
            return situation.previous.cut
        nothing = ErrorMap.empty(situation.error_map.names)
        return _cheapest(self.choices(replace(situation, error_map=nothing))).cut

    def choices(self, situation: Situation) -> list[CutChoice]:
        """All candidate cuts that memory holds, with their costs; empty without a cost model, a budget or layers."""
        left = situation.flops_left
        if situation.costs is None or left is None or situation.flops_allowed is None or not _layer_depths(situation):
            return []
        signal = self._by_depth(situation)
        total, exponent = sum(signal.values()), self.bias_exponent or NEW_HEAD_EXPONENT
        choices: list[CutChoice] = []
        for cut in sorted({component.depth for component in situation.components}):
            flops, steps = affords(situation, cut)
            worth = self._worth(steps, situation.steps_per_epoch)
            out_of_reach = 1.0 - sum(value for depth, value in signal.items() if depth >= cut) / total
            bias = (_missed_below(cut, situation) * out_of_reach) ** exponent
            variance = choices[0].worth / worth if choices else 1.0
            cost = bias + self.noise_weight * variance
            choices.append(
                CutChoice(
                    cut=cut, step_flops=flops, steps=steps, worth=worth, bias=bias, variance=variance, cost=cost
                )
            )  # fmt: skip
        choices = [choice for choice in choices if choice.cut >= situation.lowest_cut]
        affordable = [choice for choice in choices if choice.step_flops <= left]
        return affordable or [min(choices, key=lambda choice: choice.step_flops)]

    def _worth(self, steps: float, epoch: float | None) -> float:
        """Steps in terms of such as see new examples."""
        if epoch is None or steps <= epoch:
            return steps
        return epoch * (1.0 + self.repetition * (1.0 - math.exp(1.0 - steps / epoch)))

    def _by_depth(self, situation: Situation) -> dict[int, float]:
        """Shrunken signal r_d per depth; equal layers where nothing is known."""
        return self._shrunk(_layer_depths(situation), *_summed(situation, situation.error_map))

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


def _missed_below(cut: int, situation: Situation) -> float:
    """u_c: what the readout of the last layer below the cut leaves unexplained; 1 where that is not known."""
    depths = {*_layer_depths(situation), *situation.unexplained}  # of layers that are frozen anyway, too
    below = max((depth for depth in depths if depth < cut), default=None)
    return 1.0 if below is None else situation.unexplained.get(below, 1.0)


def _cheapest(choices: Sequence[CutChoice]) -> CutChoice:
    return min(choices, key=lambda choice: (choice.cost, choice.cut))


def affords(situation: Situation, cut: int) -> tuple[float, float]:
    """FLOPs of a step with everything on above a cut, and how many steps the whole budget buys, at least one.

    Where a cache keeps what lies below the cut, an epoch's repetition is cheaper than the epoch.
    """
    assert situation.costs is not None
    assert situation.flops_allowed is not None
    above = frozenset(c.name for c in situation.components if c.depth >= cut)
    known = cut if situation.is_cached else 0
    flops, again = (
        situation.accumulation
        * situation.costs.step_flops(above, rows=situation.rows, tokens=situation.tokens, cached_below=below).total
        for below in (0, known)
    )
    steps = situation.flops_allowed / flops
    epoch = situation.steps_per_epoch
    if epoch is not None and steps > epoch:
        left = situation.flops_allowed - epoch * flops
        steps = epoch + left / again if again else math.inf  # what is above may hold no product at all
    seen = situation.steps_in_data
    return flops, max(1.0, steps if seen is None else min(steps, seen))


def _layer_depths(situation: Situation) -> list[int]:
    return sorted({component.depth for component in situation.components if component.layer is not None})


def _summed(situation: Situation, error_map: ErrorMap) -> tuple[dict[int, float], dict[int, float]]:
    """Scores summed over the components of a depth, and the uncertainty of the sums."""
    shared = after_layers(situation.components)
    sums: dict[int, float] = defaultdict(float)
    squares: dict[int, float] = defaultdict(float)
    for component in situation.components:
        value = error_map.value(component.name)
        if component.name not in shared and value is not None:
            error = error_map.uncertainty(component.name)
            sums[component.depth] += value
            squares[component.depth] += float("inf") if error is None else error**2
    return dict(sums), {depth: square**0.5 for depth, square in squares.items()}
