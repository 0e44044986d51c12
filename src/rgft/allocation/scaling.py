"""Learning-rate multipliers from the error map.

Every formula takes Ê_k of the observed components; an unobserved one gets 1. Each is also a global rise of the learning
rate unless its mean is preserved: wrap it in `MeanPreserved`, or in `Bounded` for limits alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rgft.allocation.base import Scaling, Situation
from rgft.allocation.selection import depends_on_map, observations_needed, observed_scores, require_at_least
from rgft.allocation.shrinkage import shrunk
from rgft.error_map import ENOUGH
from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Uniform(Scaling):
    """f_k = 1: plain fine-tuning, or a mask alone."""

    name: ClassVar[str] = "uniform"
    needs_map: ClassVar[bool] = False

    def multipliers(self, situation: Situation) -> dict[str, float]:
        return dict.fromkeys((component.name for component in situation.components), 1.0)


@dataclass(frozen=True, kw_only=True)
class Normalised(Scaling):
    """Proposal B: f_k = 1 + α E_k / max_j E_j, or with `by="mean"` f_k = 1 + α K E_k / Σ_j E_j.

    Negative scores count as 0. K, max and Σ are over observed components; when no score is positive, every f is 1.

    Attributes:
        by: what the score is divided by.
        alpha: α ≥ 0.
    """

    name: ClassVar[str] = "normalised"
    by: Literal["max", "mean"] = "max"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.by not in ("max", "mean"):
            raise ConfigError(f"scaling.by: expected 'max' or 'mean', found {self.by!r}")
        require_at_least("scaling.alpha", self.alpha, 0.0)

    def multipliers(self, situation: Situation) -> dict[str, float]:
        factors = dict.fromkeys((component.name for component in situation.components), 1.0)
        scores = {name: max(0.0, score) for name, score in observed_scores(situation).items()}
        reference = max(scores.values(), default=0.0)
        if reference <= 0.0:
            return factors
        # Divided by the maximum first: tiny scores would underflow, huge ones overflow the sum.
        relative = {name: score / reference for name, score in scores.items()}
        weight = self.alpha if self.by == "max" else self.alpha * len(relative) / sum(relative.values())
        factors.update({name: 1.0 + weight * share for name, share in relative.items()})
        return factors


@dataclass(frozen=True, kw_only=True)
class GradientNormalised(Scaling):
    """Proposal A: f_k = 1 + γ E_k / (‖∇L‖² + ε), clamped to `bounds`.

    ‖∇L‖² is `Situation.gradient_norm_squared`, the EMA over all parameters before clipping. As long as it has not been
    measured there is no observation to scale by, and every f is 1.

    Attributes:
        gamma: γ ≥ 0.
        epsilon: ε > 0, in units of ‖∇L‖².
        bounds: smallest and largest f; 0 < smallest, since 0 would be off.
    """

    name: ClassVar[str] = "gradient_normalised"
    gamma: float = 1.0
    epsilon: float = 1e-12
    bounds: tuple[float, float] = (0.1, 10.0)

    def __post_init__(self) -> None:
        require_at_least("scaling.gamma", self.gamma, 0.0)
        if not self.epsilon > 0.0:
            raise ConfigError(f"scaling.epsilon: expected > 0, found {self.epsilon}")
        _require_bounds("scaling.bounds", *self.bounds)

    def multipliers(self, situation: Situation) -> dict[str, float]:
        factors = dict.fromkeys((component.name for component in situation.components), 1.0)
        if situation.gradient_norm_squared is None:
            return factors
        norm = situation.gradient_norm_squared + self.epsilon
        for name, score in observed_scores(situation).items():
            factors[name] = _clamped(1.0 + self.gamma * score / norm, *self.bounds)
        return factors


@dataclass(frozen=True, kw_only=True)
class Rank(Scaling):
    """f_k = 1 + α (2 r_k/(K−1) − 1), r_k the rank from 0 (lowest score) to K−1, ties averaged; mean 1 by construction.

    Negative scores rank as they are. K counts observed components; with fewer than two, every f is 1.

    Attributes:
        alpha: 0 ≤ α < 1: at 1 the lowest multiplier would be 0, which means off; a mask is the way to say that.
    """

    name: ClassVar[str] = "rank"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < 1.0:
            raise ConfigError(f"scaling.alpha: expected 0 <= alpha < 1 for rank, found {self.alpha}")

    def multipliers(self, situation: Situation) -> dict[str, float]:
        factors = dict.fromkeys((component.name for component in situation.components), 1.0)
        scores = observed_scores(situation)
        if len(scores) < 2:
            return factors
        ordered = sorted(scores.values())
        first: dict[float, int] = {}
        last: dict[float, int] = {}
        for position, score in enumerate(ordered):
            first.setdefault(score, position)
            last[score] = position
        for name, score in scores.items():
            rank = (first[score] + last[score]) / 2
            factors[name] = 1.0 + self.alpha * (2.0 * rank / (len(scores) - 1) - 1.0)
        return factors


@dataclass(frozen=True, kw_only=True)
class DecreaseRatio(Scaling):
    """RGFT's own: from the share of a component's learning that carries over to other batches.

    With G_k the generalising decrease (the error map) and S_k the same-batch one (`Situation.same_batch_map`),
    r_k = clip(G_k / S_k, floor, 1) and f_k ∝ r_k^power, mean 1 over the components that have both, within
    [f_min, f_max] (see `MeanPreserved`).

    Why: for a gradient g = μ + noise, E⟨g(B), g(A)⟩ = ‖μ‖² and E‖g‖² = ‖μ‖² + σ², so r = 1/(1 + σ²/‖μ‖²). That is the
    variance adaptation factor which minimises the expected loss along an SGD step (Balles & Hennig, "Dissecting Adam",
    ICML 2018, eq. 13). Adam's division by √E[g²] has already taken its square root, hence `power` 0.5; 1 is for SGD.

    A component with S_k ≤ 0, or missing from either map, tells nothing and gets 1. When the learned share is not
    positive (G_k ≤ 0: it memorises), the floor holds, so that it can come back. Ratios are shrunk towards their mean by
    the standard error of G_k, so that few observations leave all rates alike.

    Attributes:
        power: exponent ≥ 0; 0 turns the scaling off.
        spread: prior standard deviation of the ratios, relative to their mean.
        floor: smallest ratio that is believed, in (0, 1].
        f_min, f_max: bounds of the multiplier, 0 < f_min ≤ 1 ≤ f_max.
    """

    name: ClassVar[str] = "decrease_ratio"
    min_observations: ClassVar[int] = ENOUGH
    power: float = 0.5
    spread: float = 0.5
    floor: float = 0.01
    f_min: float = 0.25
    f_max: float = 4.0

    def __post_init__(self) -> None:
        require_at_least("scaling.power", self.power, 0.0)
        require_at_least("scaling.spread", self.spread, 0.0)
        if not 0.0 < self.floor <= 1.0:
            raise ConfigError(f"scaling.floor: expected 0 < floor <= 1, found {self.floor}")
        _require_bounds("scaling.f_min, f_max", self.f_min, self.f_max, around_one=True)

    def multipliers(self, situation: Situation) -> dict[str, float]:
        factors = dict.fromkeys((component.name for component in situation.components), 1.0)
        same_batch = situation.same_batch_map
        if same_batch is None:
            return factors
        ratios: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        for name, generalising in observed_scores(situation).items():
            memorised_too = same_batch.value(name) if name in same_batch.names else None
            if memorised_too is not None and memorised_too > 0.0:
                ratios[name] = _clamped(generalising / memorised_too, -1.0, 1.0)
                error = situation.error_map.uncertainty(name)
                errors[name] = None if error is None else error / memorised_too
        if not ratios:
            return factors
        mean = max(self.floor, sum(ratios.values()) / len(ratios))
        believed = shrunk(ratios, errors, mean=mean, spread=self.spread * mean)
        raw = {name: _clamped(ratio, self.floor, 1.0) ** self.power for name, ratio in believed.items()}
        factors.update(with_mean_one(raw, self.f_min, self.f_max))
        return factors


@dataclass(frozen=True, kw_only=True)
class Bounded(Scaling):
    """Another scaling, clamped to [f_min, f_max]. The mean is not preserved; `MeanPreserved` does both."""

    name: ClassVar[str] = "bounded"
    scaling: Scaling
    f_min: float = 0.1
    f_max: float = 10.0

    def __post_init__(self) -> None:
        _require_bounds("scaling.f_min, f_max", self.f_min, self.f_max)

    @property
    def needs_map(self) -> bool:
        return depends_on_map(self.scaling)

    @property
    def min_observations(self) -> int:
        return observations_needed(self.scaling)

    def multipliers(self, situation: Situation) -> dict[str, float]:
        raw = self.scaling.multipliers(situation)
        seen = observed_scores(situation)
        return {name: _clamped(f, self.f_min, self.f_max) if name in seen else 1.0 for name, f in raw.items()}


@dataclass(frozen=True, kw_only=True)
class MeanPreserved(Scaling):
    """Another scaling, divided by its mean over the observed components, within [f_min, f_max].

    The divisor is the one for which the mean is 1 *after* clamping. Alone, the mean is over all observed components;
    inside `Composed` it is over those that the mask leaves on, because off components do not use their multiplier.
    Unobserved components stay at 1 and count neither way, so the mean over everything is 1 too.

    Attributes:
        scaling: whose multipliers.
        f_min, f_max: bounds, 0 ≤ f_min ≤ 1 ≤ f_max.
    """

    name: ClassVar[str] = "mean_preserved"
    scaling: Scaling
    f_min: float = 0.0
    f_max: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.f_min <= 1.0 <= self.f_max:
            raise ConfigError(f"scaling: expected 0 <= f_min <= 1 <= f_max, found {self.f_min}, {self.f_max}")

    @property
    def needs_map(self) -> bool:
        return depends_on_map(self.scaling)

    @property
    def min_observations(self) -> int:
        return observations_needed(self.scaling)

    def multipliers(self, situation: Situation) -> dict[str, float]:
        return self.among(situation, frozenset(component.name for component in situation.components))

    def among(self, situation: Situation, names: frozenset[str]) -> dict[str, float]:
        """The multipliers with mean 1 over the observed components in `names`."""
        raw = self.scaling.multipliers(situation)
        observed = {name: raw[name] for name in observed_scores(situation) if name in names}
        return {**raw, **with_mean_one(observed, self.f_min, self.f_max)}


def with_mean_one(raw: dict[str, float], f_min: float, f_max: float) -> dict[str, float]:
    """clip(c · raw, f_min, f_max) with the c > 0 that makes its mean 1; all 1 when nothing in `raw` is positive.

    The mean is a piecewise linear, rising function of c: its kinks are tried in order, then the line is solved. Where
    too many are 0 and f_max forbids mean 1, the positive ones end at f_max.
    """
    positive = [f for f in raw.values() if f > 0.0]
    if not positive:
        return dict.fromkeys(raw, 1.0)
    largest = max(positive)
    shape = {name: f / largest for name, f in raw.items()}

    def total(c: float) -> float:
        return sum(_clamped(c * f, f_min, f_max) for f in shape.values())

    kinks = sorted({bound / f for f in shape.values() if f > 0.0 for bound in (f_min, f_max) if 0.0 < bound < math.inf})
    low = max((c for c in kinks if total(c) <= len(shape)), default=0.0)
    # Between two kinks exactly the unclamped ones grow with c.
    inside = low + (min((c for c in kinks if c > low), default=2.0 * low + 2.0) - low) / 2
    growing = sum(f for f in shape.values() if f_min < inside * f < f_max)
    c = low + (len(shape) - total(low)) / growing if growing > 0.0 else low
    return {name: _clamped(c * f, f_min, f_max) for name, f in shape.items()}


def _clamped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _require_bounds(setting: str, low: float, high: float, *, around_one: bool = False) -> None:
    if not 0.0 < low <= high or (around_one and not low <= 1.0 <= high):
        expected = "0 < low <= 1 <= high" if around_one else "0 < low <= high"
        raise ConfigError(f"{setting}: expected {expected}, found {low}, {high}; to turn components off, use a mask")
