"""Scores of a component's gradient: its norm, its Fisher information, and what it says together with the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rgft.components import Component
from rgft.errors import ConfigError
from rgft.signals.base import GradientSignal, PartGradient, at_least_float32


def check_choice(setting: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{setting}: expected one of {', '.join(map(repr, allowed))}; found {value!r}")


def norm_from_powers(total: float, p: int, numel: int, normalise: str) -> float:
    """(Σ|x|^p)^{1/p}, divided by n^{1/p} when `normalise` is "rms"."""
    return (total / numel if normalise == "rms" else total) ** (1.0 / p)


def power_sum(tensor: Tensor, p: int) -> Tensor:
    """Σ|x|^p as a 0-dim tensor."""
    values = at_least_float32(tensor)
    return values.abs().sum() if p == 1 else values.square().sum()


@dataclass(frozen=True, kw_only=True)
class GradNorm(GradientSignal):
    """s_k = ‖∇_{θ_k} L_B‖_p (proposal B): how strongly the batch pulls at a component.

    Attributes:
        p: 1 or 2.
        normalise: "rms" divides by n_k^{1/p}, so that large components do not win by size; "raw" is the literal form.
    """

    name: ClassVar[str] = "grad_norm"
    p: int = 2
    normalise: Literal["rms", "raw"] = "rms"

    def __post_init__(self) -> None:
        check_choice("grad_norm.p", self.p, (1, 2))
        check_choice("grad_norm.normalise", self.normalise, ("rms", "raw"))

    def partial(self, part: PartGradient) -> Tensor:
        return power_sum(part.gradient, self.p)

    def finish(self, total: float, component: Component) -> float:
        return norm_from_powers(total, self.p, component.numel, self.normalise)

    @property
    def sketchable(self) -> Literal["squared_norm", "decrease"] | None:
        return "squared_norm" if self.p == 2 else None


@dataclass(frozen=True, kw_only=True)
class Fisher(GradientSignal):
    """Σ g² over the component's elements, or its mean: a diagonal empirical Fisher information of one batch.

    The square is of the batch's mean gradient, not the mean of per-example squares, which no single backward pass
    gives; for batches of one both agree (Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", eq. 5).

    Attributes:
        reduction: "mean" over the component's elements or "sum".
    """

    name: ClassVar[str] = "fisher"
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        check_choice("fisher.reduction", self.reduction, ("mean", "sum"))

    def partial(self, part: PartGradient) -> Tensor:
        return power_sum(part.gradient, 2)

    def finish(self, total: float, component: Component) -> float:
        return total / component.numel if self.reduction == "mean" else total

    @property
    def sketchable(self) -> Literal["squared_norm", "decrease"] | None:
        return "squared_norm"


@dataclass(frozen=True, kw_only=True)
class Taylor(GradientSignal):
    """|θ·g|: first-order change of the loss when weights are removed (Molchanov et al. 2019, eq. 8, before squaring).

    Attributes:
        group: False sums |θ_i g_i| over elements; True is |Σ_i θ_i g_i|, removing the whole component at once. The
            latter vanishes for weights that a normalisation follows, whose scale the loss does not see.
    """

    name: ClassVar[str] = "taylor"
    group: bool = False

    def __post_init__(self) -> None:
        check_choice("taylor.group", self.group, (True, False))

    def partial(self, part: PartGradient) -> Tensor:
        products = at_least_float32(part.weight) * at_least_float32(part.gradient)
        return products.sum() if self.group else products.abs().sum()

    def finish(self, total: float, component: Component) -> float:
        return abs(total)


@dataclass(frozen=True, kw_only=True)
class GradOverWeight(GradientSignal):
    """Σ |g| / (|θ|+ε)^e: large gradients on small weights (ID³, Agarwal et al. 2024, the D³ heuristic).

    Attributes:
        exponent: e ≥ 0; 0 is the gradient's 1-norm.
        epsilon: ε > 0.
        reduction: "mean" over the component's elements or "sum".
    """

    name: ClassVar[str] = "grad_over_weight"
    exponent: float = 1.0
    epsilon: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        problems = [
            f"grad_over_weight.{setting}: expected a number {bound}; found {value!r}"
            for setting, value, bound, good in (
                ("exponent", self.exponent, ">= 0", self.exponent >= 0),
                ("epsilon", self.epsilon, "> 0", self.epsilon > 0),
            )
            if not good
        ]
        if problems:
            raise ConfigError(problems)
        check_choice("grad_over_weight.reduction", self.reduction, ("mean", "sum"))

    def partial(self, part: PartGradient) -> Tensor:
        scale = at_least_float32(part.weight).abs().add(self.epsilon).pow(self.exponent)
        return at_least_float32(part.gradient).abs().div(scale).sum()

    def finish(self, total: float, component: Component) -> float:
        return total / component.numel if self.reduction == "mean" else total
