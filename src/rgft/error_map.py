"""The error map: a running, bias-corrected score per component, with its uncertainty.

E_k ← β E_k + (1−β) s_k with E_k(0) = 0; Ê_k = E_k / (1−β^{n_k}), n_k counting k's own observations (as Adam's bias
correction, Kingma & Ba 2015, eq. 3). Beside it runs the exponentially weighted variance of the scores. A component that
was not observed is held: neither its value nor its count changes, and it is never counted as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rgft.errors import ConfigError, NonFiniteError

#: Observations of a component from which on it is known how far they are from the truth.
ENOUGH = 4


@dataclass(frozen=True, kw_only=True)
class ErrorMap:
    """Immutable: `observe` returns a new map.

    Attributes:
        names: all components, in the partition's order.
        beta: β per observation, in [0, 1).
        bias_correction: whether `value` divides by 1−β^{n_k}.
        averages: uncorrected E_k per component observed at least once.
        squares: uncorrected running mean of s_k² (for the variance).
        counts: n_k, the number of observations of k.
        step: step of the latest observation, or −1.
    """

    names: tuple[str, ...]
    beta: float = 0.9
    bias_correction: bool = True
    averages: Mapping[str, float] = field(default_factory=dict)
    squares: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    step: int = -1

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ConfigError(f"error_map.beta: expected 0 <= beta < 1, found {self.beta}")

    def observe(self, scores: Mapping[str, float], *, step: int) -> ErrorMap:
        """The map after one observation. Components missing from `scores` are held.

        Raises:
            KeyError: a score for an unknown component.
            NonFiniteError: a score is NaN or infinite; the map is unchanged.
        """
        unknown = set(scores) - set(self.names)
        if unknown:
            raise KeyError(f"scores for components that the error map does not have: {sorted(unknown)}")
        bad = [name for name, score in scores.items() if not math.isfinite(score)]
        if bad:
            raise NonFiniteError(f"step {step}: the score of {bad[0]!r} ({scores[bad[0]]}) is not finite")
        averages, squares, counts = dict(self.averages), dict(self.squares), dict(self.counts)
        for name, score in scores.items():
            averages[name] = self.beta * averages.get(name, 0.0) + (1.0 - self.beta) * score
            squares[name] = self.beta * squares.get(name, 0.0) + (1.0 - self.beta) * score * score
            counts[name] = counts.get(name, 0) + 1
        return replace(self, averages=averages, squares=squares, counts=counts, step=max(step, self.step))

    def _correction(self, name: str) -> float:
        return 1.0 - self.beta ** self.counts[name]

    def is_observed(self, name: str) -> bool:
        return self.counts.get(name, 0) > 0

    @property
    def observed(self) -> tuple[str, ...]:
        """Names with at least one observation, in the partition's order."""
        return tuple(name for name in self.names if self.is_observed(name))

    def value(self, name: str) -> float | None:
        """Ê_k, or None without an observation."""
        if not self.is_observed(name):
            return None
        return self.averages[name] / (self._correction(name) if self.bias_correction else 1.0)

    def values(self) -> dict[str, float]:
        """Ê_k of every observed component, in the partition's order."""
        return {name: value for name in self.names if (value := self.value(name)) is not None}

    def variance(self, name: str) -> float | None:
        """Exponentially weighted variance of the single scores s_k, or None with fewer than two observations."""
        if self.counts.get(name, 0) < 2:
            return None
        correction = self._correction(name)
        mean = self.averages[name] / correction
        return max(0.0, self.squares[name] / correction - mean * mean)

    def standard_error(self, name: str) -> float | None:
        """Standard error of Ê_k, were the scores independent; None with fewer than two observations.

        With weights w_i = (1−β)β^{n−i}/(1−β^n): Σw² = (1−β)(1+βⁿ) / ((1+β)(1−βⁿ)), and the weighted variance is
        unbiased after division by 1−Σw².
        """
        variance = self.variance(name)
        if variance is None:
            return None
        power = self.beta ** self.counts[name]
        weight = (1.0 - self.beta) * (1.0 + power) / ((1.0 + self.beta) * (1.0 - power))
        return math.sqrt(variance * weight / (1.0 - weight)) if weight < 1.0 else None

    def uncertainty(self, name: str) -> float | None:
        """Standard deviation of what Ê_k may truly be; None while nothing is known of it.

        The standard error comes from the same n observations: given these, the true value has Student's t distribution
        with n − 1 degrees of freedom, whose variance is (n−1)/(n−3) times the squared error, and none for fewer than
        `ENOUGH` = 4: two observations that happen to be alike prove nothing.
        """
        error, count = self.standard_error(name), self.counts.get(name, 0)
        return error * math.sqrt((count - 1) / (count - 3)) if error is not None and count >= ENOUGH else None

    def captured(self, names: Iterable[str]) -> float | None:
        """Share of all positive values that `names` hold together; None when nothing is positive."""
        values = {name: max(0.0, value) for name, value in self.values().items()}
        total = sum(values.values())
        return sum(values.get(name, 0.0) for name in names) / total if total > 0.0 else None

    def top(self, count: int) -> tuple[tuple[str, float], ...]:
        """The `count` components with the largest values, largest first."""
        ranked = sorted(self.values().items(), key=lambda item: (-item[1], self.names.index(item[0])))
        return tuple(ranked[:count])

    def quantised(self, digits: int = 6) -> ErrorMap:
        """Values rounded to `digits` significant digits, so that ranks that differ by rounding decide alike."""

        def rounded(table: Mapping[str, float]) -> dict[str, float]:
            return {name: float(f"{value:.{digits}g}") for name, value in table.items()}

        return replace(self, averages=rounded(self.averages), squares=rounded(self.squares))

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names), "beta": self.beta, "bias_correction": self.bias_correction,
            "averages": dict(self.averages), "squares": dict(self.squares), "counts": dict(self.counts),
            "step": self.step,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ErrorMap:
        return cls(**{**data, "names": tuple(data["names"])})

    @classmethod
    def empty(cls, names: Iterable[str], *, beta: float = 0.9, bias_correction: bool = True) -> ErrorMap:
        return cls(names=tuple(names), beta=beta, bias_correction=bias_correction)
