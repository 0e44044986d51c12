"""Plans: what deciding hands to acting. Immutable, serialisable, and equal on all ranks (compare `digest`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from rgft.errors import ConfigError
from rgft.sizes import parsed_bytes


@lru_cache(maxsize=64)
def _one(names: frozenset[str]) -> frozenset[str]:
    """One object for equal sets: looking up another would compare hundreds of names, several times a step."""
    return names


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
        low_rank: components that are trained by a low-rank pair in place of their dense dW, while they are on; what is
            off keeps the form that it has. None: the policy leaves that to the configuration.
    """

    step: int
    multipliers: Mapping[str, float]
    periods: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0
    reason: str = ""
    low_rank: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        bad = {name: f for name, f in self.multipliers.items() if not 0.0 <= f < float("inf")}
        if bad:
            raise ConfigError(f"multipliers must be finite and >= 0; found {bad}")
        wrong = {name: n for name, n in self.periods.items() if n < 1 or name not in self.multipliers}
        if wrong:
            raise ConfigError(f"periods must be >= 1 and of known components; found {wrong}")
        unknown = [name for name in self.low_rank or () if name not in self.multipliers]
        if unknown:
            raise ConfigError(f"low_rank must name known components; found {unknown}")

    def is_on(self, name: str, step: int | None = None) -> bool:
        """Whether the component is updated at all, or (with `step`) at that step."""
        if self.multipliers[name] == 0.0:
            return False
        return step is None or step % self.periods.get(name, 1) == 0

    def active(self, step: int | None = None) -> tuple[str, ...]:
        """Names of the components that are on (at `step`, when given), in order."""
        if step is None or not self.periods:
            return self._on
        return tuple(name for name in self._on if step % self.periods.get(name, 1) == 0)

    def active_set(self, step: int | None = None) -> frozenset[str]:
        """What `active` names; equal sets are one and the same object, whose hash is known."""
        return self._on_set if step is None or not self.periods else _one(frozenset(self.active(step)))

    @cached_property
    def _on_set(self) -> frozenset[str]:
        return _one(frozenset(self._on))

    @cached_property
    def _on(self) -> tuple[str, ...]:
        return tuple(name for name, multiplier in self.multipliers.items() if multiplier != 0.0)

    @cached_property
    def pairs(self) -> frozenset[str]:
        """What `low_rank` names."""
        return frozenset(self.low_rank or ())

    def same_effect(self, other: UpdatePlan) -> bool:
        """Whether both plans act alike, whatever their step and reason."""
        own, others = ((plan.multipliers, plan.periods, plan.cut, plan.pairs) for plan in (self, other))
        return own == others

    def digest(self) -> str:
        """Hash of the plan's effect, to be compared between ranks."""
        content: list[Any] = [sorted(self.multipliers.items()), sorted(self.periods.items()), self.cut]
        content += [sorted(self.pairs)] if self.pairs else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UpdatePlan:
        names = data.get("low_rank")  # plans of older versions have none
        return cls(**{**data, "low_rank": None if names is None else tuple(names)})

    @classmethod
    def all_on(cls, names: tuple[str, ...], *, step: int = 0, reason: str = "all on") -> UpdatePlan:
        return cls(step=step, multipliers=dict.fromkeys(names, 1.0), reason=reason)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a run keeps to a memory budget: what was chosen, and what it is forecast to need. All amounts in bytes.

    Attributes:
        limit: of the budget.
        needed: at the height of a step, with everything on above `lowest_cut`, or while costs are traced, whichever is
            more; a margin included.
        parts: of that step, by what holds them.
        rows, tokens: of the largest batch that the run may see.
        rows_per_pass: rows that go through the model at once; fewer than `rows`: gradients are accumulated.
        checkpointing: whether gradient checkpointing is on.
        lowest_cut: nothing below it is ever trained.
        by_cut: (cut, bytes of a step) of every cut that may be decided.
        probe_size: examples per probe; 0: none.
        probes: needed by a probe.
        holds_cache: whether activations cached in memory take from the same limit (on the CPU they do).
        choices: what was done to fit, in words, in the order in which it was tried.
    """

    limit: int
    needed: int
    parts: Mapping[str, int]
    rows: int
    tokens: int
    rows_per_pass: int
    checkpointing: bool
    lowest_cut: int
    by_cut: tuple[tuple[int, int], ...]
    probe_size: int
    probes: int
    holds_cache: bool
    choices: tuple[str, ...]

    def room(self, cut: int) -> int:
        """Bytes left for cached activations, at that cut."""
        needed = next((needed for depth, needed in self.by_cut if depth >= cut), self.needed)
        return max(0, self.limit - max(needed, self.probes))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        by_cut = tuple((int(cut), int(needed)) for cut, needed in data["by_cut"])
        return cls(**{**data, "by_cut": by_cut, "choices": tuple(data["choices"])})


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is fixed for longer than a step.

    Attributes:
        steps: optimizer steps of the whole run, as far as the budget pays for them at full cost; cheaper ones are more.
        cut: depth of the planned cut.
        cache: where activations at the cut are kept.
        probes: how many probes are planned.
        probe_size: examples per probe.
        flops: predicted FLOPs of the whole run, probes and cache filling included.
        full_flops: FLOPs of full fine-tuning on the same data and epochs.
        position: the only one that training steps compute in the last layer, past its attention; None: all of them.
        computed_share: positions that training steps compute, of all; below 1 where rows of like length pass together.
        head_at_targets: whether training steps compute a language model's head only where a token is to be learnt.
        reason: why this plan, in a few words.
        memory: how it keeps to a memory budget; None: without one.
        skips: which examples and tokens are skipped, in words, with what is biased labelled; empty: none.
    """

    steps: int
    cut: int = 0
    cache: Literal["none", "memory", "disk"] = "none"
    probes: int = 0
    probe_size: int = 0
    flops: float = 0.0
    full_flops: float = 0.0
    position: int | None = None
    computed_share: float = 1.0
    head_at_targets: bool = False
    reason: str = ""
    memory: MemoryPlan | None = None
    skips: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunPlan:
        memory = data.get("memory")
        return cls(**{**data, "memory": None if memory is None else MemoryPlan.from_dict(memory)})


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a whole run may spend, scoring and cache filling included, evaluation excluded; where several are given,
    whichever is spent first ends it. Memory is not spent: it bounds every step, and ends nothing.

    Attributes:
        flops: share of the FLOPs of full fine-tuning on the same data, epochs, collator and padding, in (0, 1].
        seconds: wall-clock of steps, scoring, filling and loading.
        joules: energy of the same, measured where it can be, else estimated (`rgft.telemetry.energy`).
        memory: bytes that tensors of training may hold at once on the training device; text such as "8GB" or "7.5GiB"
            is turned into bytes.
    """

    flops: float | None = None
    seconds: float | None = None
    joules: float | None = None
    memory: int | str | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        if not self.is_spent and self.memory is None:
            problems.append("budget: expected flops, seconds, joules, memory or several of them, found none")
        if self.flops is not None and not 0.0 < self.flops <= 1.0:
            problems.append(
                f"budget.flops: expected a share of full fine-tuning's FLOPs, 0 < flops <= 1, found {self.flops}"
            )
        if self.seconds is not None and not 0.0 < self.seconds < float("inf"):
            problems.append(f"budget.seconds: expected a number of seconds > 0, found {self.seconds}")
        if self.joules is not None and not 0.0 < self.joules < float("inf"):
            problems.append(f"budget.joules: expected a number of joules > 0, found {self.joules}")
        if self.memory is not None:
            try:
                object.__setattr__(self, "memory", parsed_bytes(self.memory, setting="budget.memory"))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    @property
    def is_spent(self) -> bool:
        """Whether it ends the run: memory alone does not."""
        return self.flops is not None or self.seconds is not None or self.joules is not None

    @property
    def memory_bytes(self) -> int | None:
        """The limit of memory in bytes."""
        return None if self.memory is None else int(self.memory)
