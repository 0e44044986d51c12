"""Plans: what deciding hands to acting. Immutable, serialisable, and equal on all ranks (compare `digest`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """What each component does from step `step` on, until the next plan.

    Attributes:
        step: first step the plan is applied to; it was decided from scores up to step−1.
        multipliers: learning-rate multiplier per component; 0 is off: no dW, no step, no decay, no momentum.
        periods: update at steps divisible by n, for components whose n is not 1. The phase is the run's,
            so that a plan decided anew at every step keeps its rhythm.
        cut: depth below which everything is off and backward stops.
        reason: which policy decided, and why, in a few words.
    """

    step: int
    multipliers: Mapping[str, float]
    periods: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        bad = {name: f for name, f in self.multipliers.items() if not 0.0 <= f < float("inf")}
        if bad:
            raise ConfigError(f"multipliers must be finite and >= 0; found {bad}")
        wrong = {name: n for name, n in self.periods.items() if n < 1 or name not in self.multipliers}
        if wrong:
            raise ConfigError(f"periods must be >= 1 and of known components; found {wrong}")

    def is_on(self, name: str, step: int | None = None) -> bool:
        """Whether the component is updated at all, or (with `step`) at that step."""
        if self.multipliers[name] == 0.0:
            return False
        return step is None or step % self.periods.get(name, 1) == 0

    def active(self, step: int | None = None) -> tuple[str, ...]:
        """Names of the components that are on (at `step`, when given), in order."""
        return tuple(name for name in self.multipliers if self.is_on(name, step))

    def same_effect(self, other: UpdatePlan) -> bool:
        """Whether both plans act alike, whatever their step and reason."""
        return (self.multipliers, self.periods, self.cut) == (other.multipliers, other.periods, other.cut)

    def digest(self) -> str:
        """Hash of the plan's effect, to be compared between ranks."""
        content = [sorted(self.multipliers.items()), sorted(self.periods.items()), self.cut]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UpdatePlan:
        return cls(**data)

    @classmethod
    def all_on(cls, names: tuple[str, ...], *, step: int = 0, reason: str = "all on") -> UpdatePlan:
        return cls(step=step, multipliers=dict.fromkeys(names, 1.0), reason=reason)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is fixed for longer than a step.

    Attributes:
        steps: optimizer steps of the whole run, and the learning-rate horizon.
        cut: depth of the planned cut.
        cache: where activations at the cut are kept.
        probes: how many probes are planned.
        probe_size: examples per probe.
        flops: predicted FLOPs of the whole run, probes and cache filling included.
        full_flops: FLOPs of full fine-tuning on the same data and epochs.
        position: the only one that training steps compute in the last layer, past its attention; None: all of them.
        head_at_targets: whether training steps compute a language model's head only where a token is to be learnt.
        reason: why this plan, in a few words.
    """

    steps: int
    cut: int = 0
    cache: Literal["none", "memory", "disk"] = "none"
    probes: int = 0
    probe_size: int = 0
    flops: float = 0.0
    full_flops: float = 0.0
    position: int | None = None
    head_at_targets: bool = False
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunPlan:
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a whole run may spend, scoring and cache filling included, evaluation excluded; where several are given,
    whichever is spent first ends it.

    Attributes:
        flops: share of the FLOPs of full fine-tuning on the same data, epochs, collator and padding, in (0, 1].
        seconds: wall-clock of steps, scoring, filling and loading.
    """

    flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.flops is None and self.seconds is None:
            problems.append("budget: expected flops, seconds or both, found none")
        if self.flops is not None and not 0.0 < self.flops <= 1.0:
            problems.append(
                f"budget.flops: expected a share of full fine-tuning's FLOPs, 0 < flops <= 1, found {self.flops}"
            )
        if self.seconds is not None and not 0.0 < self.seconds < float("inf"):
            problems.append(f"budget.seconds: expected a number of seconds > 0, found {self.seconds}")
        if problems:
            raise ConfigError(problems)
