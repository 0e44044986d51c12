"""Learning-rate schedules over the share of a run that is spent, so that their horizon is the budget's end."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from rgft.errors import ConfigError

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}


def check_scheduler(scheduler: LRScheduler | None) -> None:
    """Refuses a scheduler whose step needs a metric, before anything is updated.

    Raises:
        ConfigError: it is one (`ReduceLROnPlateau`).
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler: expected one that steps without a metric, found ReduceLROnPlateau; use "
            "guide.scheduler(optimizer), or leave it out of guide.step and call scheduler.step(loss) yourself after "
            "each evaluation"
        )


def learning_rate_schedule(
    optimizer: Optimizer, progress: Callable[[], float], *, shape: str = "linear", warmup: float = 0.1
) -> LambdaLR:
    """Linear warm-up, then `shape`, as a function of `progress()` ∈ [0, 1].

    Args:
        optimizer: whose groups' rates are scaled.
        progress: share of the run that is spent, read at each scheduler step.
        shape: "linear" (to 0), "cosine" (to 0) or "constant".
        warmup: share of the run with a rising rate.

    Raises:
        ConfigError: an unknown shape, or a warm-up outside [0, 1).
    """
    if shape not in SHAPES:
        raise ConfigError(f"schedule: expected one of {', '.join(SHAPES)}, found {shape!r}")
    if not 0.0 <= warmup < 1.0:
        raise ConfigError(f"warmup: expected 0 <= warmup < 1 (a share of the run), found {warmup}")

    def factor(step: int) -> float:
        done = min(1.0, progress())
        if done < warmup:
            # Before the first step nothing is spent; a rate of 0 would waste that step.
            return max(done / warmup, 1e-2)
        return SHAPES[shape]((done - warmup) / (1.0 - warmup))

    return LambdaLR(optimizer, factor)
