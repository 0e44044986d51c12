"""Prefixes that freeze or thaw: AutoFreeze, gradual freezing, gradual unfreezing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import SelectionPolicy, by_layer, require_at_least, require_fraction
from rgft.allocation.turns import require_stretch, turn
from rgft.components import Component
from rgft.errors import ConfigError


def above_layer(components: tuple[Component, ...], frozen: int) -> frozenset[str]:
    """Everything above the lowest `frozen` layers; with 0 everything. What lies before the layers freezes first."""
    layers = list(by_layer(components).values())
    below = {c.name for members in layers[:frozen] for c in members}
    if frozen > 0 and layers:
        first = min(c.depth for c in layers[0])
        below.update(c.name for c in components if c.layer is None and c.depth < first)
    return frozenset(c.name for c in components if c.name not in below)


def frozen_layers(components: tuple[Component, ...], on: frozenset[str]) -> int:
    """Number of layers at the bottom of which nothing is on."""
    count = 0
    for members in by_layer(components).values():
        if any(component.name in on for component in members):
            break
        count += 1
    return count


@dataclass(frozen=True, kw_only=True)
class AutoFreeze(SelectionPolicy):
    """A frozen prefix that grows while the lowest active layers' gradient norms have stopped changing.

    Liu et al., "AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning", 2021 (arXiv:2102.01386):
    every `every` steps the rate of change of each active layer's gradient norm is compared with the N-th percentile of
    those rates, and the prefix takes up the lowest active layers, one after the other, while they do not exceed it.
    There the rate is |‖Δ_{t−1}‖ − ‖Δ_t‖| / ‖Δ_{t−1}‖ between two intervals. The error map keeps running moments instead
    of its last value, so the rate is the coefficient of variation √Σ_k Var_k / Σ_k Ê_k over the layer's components: the
    same quantity over the EMA's horizon. Signal `grad_norm`, p 2, raw. A layer with fewer than two observations of a
    component stops the prefix. Growing for good, by design; the last layer and what follows it always train.
    Outside a plan: AutoFreeze caches the activations at the prefix (RGFT's activation cache).

    Attributes:
        percentile: N, in [0, 100].
        every: steps between evaluations, or a share of the run; between them the prefix stays.
    """

    name: ClassVar[str] = "autofreeze"
    percentile: float = 50.0
    every: float = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.percentile <= 100.0:
            raise ConfigError(f"policy.percentile: expected 0 <= percentile <= 100, found {self.percentile}")
        require_stretch("policy.every", self.every)

    def active(self, situation: Situation) -> frozenset[str]:
        components, previous = situation.components, situation.previous
        layers = list(by_layer(components))
        frozen = frozen_layers(components, frozenset(previous.active())) if previous else 0
        if previous is not None and self._turn(situation, situation.step) == self._turn(situation, previous.step):
            return above_layer(components, min(frozen, max(0, len(layers) - 1)))
        rates = self.rates(situation)
        limit = percentile([rates[layer] for layer in layers[frozen:] if layer in rates], self.percentile)
        while frozen < len(layers) - 1 and rates.get(layers[frozen], math.inf) <= limit:
            frozen += 1
        return above_layer(components, frozen)

    def _turn(self, situation: Situation, step: int) -> int:
        return turn("policy.every", self.every, situation, step=step)

    def rates(self, situation: Situation) -> Mapping[str, float]:
        """Rate of change per layer; a layer is left out until all of its components have two observations."""
        rates: dict[str, float] = {}
        for layer, members in by_layer(situation.components).items():
            variances = [situation.error_map.variance(c.name) for c in members]
            norm = sum(max(0.0, situation.error_map.value(c.name) or 0.0) for c in members)
            if norm > 0.0 and all(variance is not None for variance in variances):
                rates[layer] = math.sqrt(sum(variance or 0.0 for variance in variances)) / norm
        return rates


def percentile(values: list[float], percent: float) -> float:
    """The percentile with linear interpolation between order statistics; −∞ of nothing."""
    if not values:
        return -math.inf
    ordered = sorted(values)
    position = percent / 100.0 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True, kw_only=True)
class GradualFreezing(SelectionPolicy):
    """Layers freeze from the bottom at an even pace until `keep` of them are left at `until`.

    The schedule of FreezeOut (Brock et al. 2017, arXiv:1706.04983) in its linear form, without its per-layer annealing
    of the learning rate. Independent of the error map.

    Attributes:
        keep: layers that are never frozen.
        until: share of the run at which only they are left, in (0, 1].
        steps: length of the run; None takes `Situation.total_steps`.
    """

    name: ClassVar[str] = "gradual_freezing"
    needs_map: ClassVar[bool] = False
    keep: int = 1
    until: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        require_at_least("policy.keep", self.keep, 0)
        if not 0.0 < self.until <= 1.0:
            raise ConfigError(f"policy.until: expected 0 < until <= 1, found {self.until}")

    def active(self, situation: Situation) -> frozenset[str]:
        total = self.steps or situation.total_steps
        if not total:
            raise ConfigError("policy.steps: the run's length is not known here; give steps=<number>")
        freezable = max(0, len(by_layer(situation.components)) - self.keep)
        progress = min(1.0, situation.step / (self.until * total))
        return above_layer(situation.components, math.floor(round(progress * freezable, 9)))


@dataclass(frozen=True, kw_only=True)
class GradualUnfreezing(SelectionPolicy):
    """Only what runs after the layers at first; then one more layer from the top every `every` steps.

    Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT), ACL 2018, section 3.3,
    where it is one layer per epoch. Once all layers are on, what lies before them joins. Independent of the error map.

    Attributes:
        every: steps per layer.
        until: share of the run after which everything trains, in (0, 1], in place of `every`; None: as `every` says.
    """

    name: ClassVar[str] = "gradual_unfreezing"
    needs_map: ClassVar[bool] = False
    every: int = 100
    until: float | None = None

    def __post_init__(self) -> None:
        require_at_least("policy.every", self.every, 1)
        if self.until is not None:
            require_fraction("policy.until", self.until)

    def active(self, situation: Situation) -> frozenset[str]:
        layers = len(by_layer(situation.components))
        thawed = turn("policy.every", self.every if self.until is None else self.until / (layers + 1), situation)
        if thawed > layers:
            return above_layer(situation.components, 0)
        on = above_layer(situation.components, layers - thawed)
        first = min((c.depth for c in situation.components if c.layer is not None), default=0)
        return frozenset(c.name for c in situation.components if c.name in on and c.depth >= first)
