"""What a run is told, and what it tells: after each step, and at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from rgft.errors import ConfigError
from rgft.learning_rate import usual_rate
from rgft.optimizer import KINDS
from rgft.search import FACTORS, are_rates, first_rate

SCHEDULE_FREE = frozenset(kind.name for kind in KINDS.values() if kind.is_schedule_free)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told beside RGFT's own configuration.

    Attributes:
        optimizer: by name; see `rgft.optimizer.KINDS`.
        lr: learning rate at multiplier 1. "auto": by rule, once it is known how many passes over the data the budget
            buys (`rgft.learning_rate`). Several: the best is searched for inside the budget (`rgft.search`); "search":
            among rates around the rule's.
        epochs: of the full fine-tuning that the budget is a share of.
        batch_size: examples per optimizer step and micro-batch.
        accumulation: micro-batches per optimizer step.
        weight_decay: decoupled, of weights (not of biases and norms).
        schedule, warmup: see `Guide.scheduler`.
        max_grad_norm: clipping threshold of the gradient's norm; None does not clip.
        precision: "fp32", or "bf16" for autocast.
        checkpoint_every: steps between checkpoints in the run folder; 0: none but the last.
        eval_batch_size: examples per evaluation batch.
    """

    optimizer: str = "adamw"
    lr: float | tuple[float, ...] | Literal["auto", "search"] = "auto"
    epochs: float = 3.0
    batch_size: int = 32
    accumulation: int = 1
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.1
    max_grad_norm: float | None = 1.0
    precision: str = "fp32"
    checkpoint_every: int = 0
    eval_batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {what}, found {value!r}"
            for name, what, value, ok in (
                ("optimizer", f"one of {', '.join(KINDS)}", self.optimizer, self.optimizer in KINDS),
                (
                    "schedule",
                    f"'constant' with {self.optimizer}, whose mean of iterates takes the schedule's place",
                    self.schedule,
                    self.schedule == "constant" or self.optimizer not in SCHEDULE_FREE,
                ),
                (
                    "lr",
                    "numbers > 0, each once, 'auto' or 'search'",
                    self.lr,
                    self.lr in ("auto", "search") or are_rates(self._given_lrs),
                ),
                ("epochs", "a number > 0", self.epochs, self.epochs > 0),
                ("batch_size", "an integer >= 1", self.batch_size, self.batch_size >= 1),
                ("accumulation", "an integer >= 1", self.accumulation, self.accumulation >= 1),
                ("weight_decay", "a number >= 0", self.weight_decay, self.weight_decay >= 0),
                ("precision", "'fp32' or 'bf16'", self.precision, self.precision in ("fp32", "bf16")),
                ("checkpoint_every", "an integer >= 0", self.checkpoint_every, self.checkpoint_every >= 0),
            )
            if not ok
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def is_lr_searched(self) -> bool:
        return self.lr == "search" or (isinstance(self.lr, tuple) and len(self.lr) > 1)

    @property
    def is_lr_by_rule(self) -> bool:
        return isinstance(self.lr, str)

    def first_lr(
        self, model: nn.Module, *, passes: float = 1.0, steps: float = math.inf, trained: float = 1.0
    ) -> float:  # fmt: skip
        """What a run begins with: the rate that is given, the lower of the middle ones, or `usual_rate`."""
        if isinstance(self.lr, str):
            factor = KINDS[self.optimizer].rate_factor
            return usual_rate(model, passes=passes, steps=steps, trained=trained, factor=factor)
        return first_rate(self._given_lrs)

    def candidate_lrs(self, usual: float) -> tuple[float, ...]:
        """The rates that a search may choose from, where the rule's is `usual`."""
        if isinstance(self.lr, str):
            return tuple(float(f"{times * usual:.2g}") for times in FACTORS)
        return self._given_lrs

    @property
    def _given_lrs(self) -> tuple[Any, ...]:
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an observer sees after each step: all numbers are of the run so far."""

    step: int
    loss: float
    progress: float
    flops_fraction: float
    seconds: float
    step_seconds: float
    active: int
    components: int
    cut: int
    captured: float | None
    top: tuple[tuple[str, float], ...]


@dataclass(kw_only=True)
class Result:
    """What came out of a run.

    Attributes:
        metrics: of the last evaluation, by split.
        ledger: summary of all that was spent.
        step_seconds: seconds of each optimizer step.
    """

    steps: int
    metrics: dict[str, dict[str, float]]
    ledger: dict[str, Any]
    step_seconds: list[float] = field(default_factory=list)
