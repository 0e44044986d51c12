"""Probes: looks at examples that the run never trains on, within their share of the budget."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from rgft.batches import BatchStream
from rgft.config.sections import ProbeConfig
from rgft.measurement import Measurement
from rgft.probe_schedule import ProbePool, ProbeSchedule, set_aside
from rgft.spending import Spending
from rgft.telemetry.flop_counter import flop_counter
from rgft.workload import batch_shape

log = logging.getLogger("rgft")

#: A probe needs an example that makes a step, and one to judge it by.
MIN_EXAMPLES = 2
#: Steps scored while measuring. A map forgets older ones: scoring each of many would cost time and tell nothing.
MAX_SCORED_STEPS = 32


class Prober:
    """When to look, at how many examples, and at what price.

    Args:
        measurement: what is measured; None: nothing is.
        settings: of the probes.
        spending: pays for them.

    Attributes:
        schedule: fixed by `plan`; empty before.
        pool: the examples; None: there are none to look at.
        history: step and scores at each probe.
    """

    def __init__(self, measurement: Measurement | None, settings: ProbeConfig, spending: Spending) -> None:
        self._measurement, self._settings, self._spending = measurement, settings, spending
        self.schedule = ProbeSchedule()
        self.pool: ProbePool | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self._stride = 1  # while measuring, one step in so many is scored
        self._spare = 0  # examples that may be set aside
        self._last = (0, 0.0)  # step and progress
        self._ratio: float | None = None  # FLOPs of a probe, per those of one forward and backward pass

    def plan(self, *, steps: int, measuring: float, examples: int) -> None:
        """Fixes the schedule.

        Args:
            steps: optimizer steps of the run.
            measuring: share of it that the measuring phase takes.
            examples: of the training set; a tenth of it may be set aside.
        """
        spending, settings = self._spending, self._settings
        assert spending.costs is not None
        scored = MAX_SCORED_STEPS
        if dry := 2.0 * sum(spending.optimizer_flops.values()):  # each score finds out its own step and the one before
            scored = max(1, min(scored, int(settings.max_fraction * spending.allowed / dry)))
        self._stride = max(1, int(measuring * steps / scored))
        self.schedule = ProbeSchedule.derive(
            interval=settings.interval, size=settings.size, steps=steps,
            flops_allowed=spending.allowed * settings.max_fraction,
            flops_per_example=spending.costs.probe_flops(1, spending.typical[1], weights=True),
        )  # fmt: skip
        self._spare = examples // 10
        if self.schedule.size > self._spare:
            enough = self._spare >= MIN_EXAMPLES
            log.warning(
                "probes: %d examples wanted, a tenth of the training set is %d: probing %s", self.schedule.size,
                self._spare, "with those" if enough else "nothing",
            )  # fmt: skip
            self.schedule = replace(self.schedule, size=self._spare) if enough else ProbeSchedule()

    def limit(self, size: int) -> None:
        """Makes probes of more examples smaller; below two there are none."""
        if size < MIN_EXAMPLES:
            self.schedule = ProbeSchedule()
        elif self.schedule.size > size:
            self.schedule = replace(self.schedule, size=size)

    @property
    def examples(self) -> int:
        """How many examples should be set aside; 0: none."""
        # Whole probes, so that no example is in both halves of one.
        return min(4, self._spare // self.schedule.size) * self.schedule.size if self.schedule.is_on else 0

    def set_aside(self, stream: BatchStream) -> Sequence[int]:
        """Takes its pool out of the stream's examples; returns those that are left to be trained on."""
        total = len(stream.dataset)
        if not self.examples:
            return range(total)
        train, pool = set_aside(total, self.examples, seed=stream.seed)
        self.pool = ProbePool(pool, stream.load, seed=stream.seed)
        return train

    def number(self, steps: int) -> int:
        """How many probes are planned for a run of so many optimizer steps."""
        return self.schedule.number or steps // max(1, self.schedule.interval) * self.schedule.is_on

    def scores_step(self, step: int) -> bool:
        """Whether the gradients of this step of the measuring phase are scored."""
        return (step + 1) % self._stride == 0

    def is_due(self, step: int, progress: float) -> bool:
        """Whether to look before `step`."""
        last_step, last_progress = self._last
        return self.schedule.is_due(step=step, last_step=last_step, progress=progress, last_progress=last_progress)

    def probe(self, *, step: int, progress: float, gradient_norm: bool, pays: Callable[[float], bool]) -> bool:
        """Looks now; False where there is nothing to look at, or the budget has no room for it.

        Args:
            step: the next one.
            progress: of the run.
            gradient_norm: whether the measurement takes the norm of the whole gradient, too.
            pays: FLOPs → whether the run can pay for them beside its next step.
        """
        if self.pool is None or self._measurement is None:
            return False
        started, size, spending = time.perf_counter(), self.schedule.size, self._spending
        if not self._fits(self._flops([(size, spending.typical[1])]), pays):
            return False
        own = self.pool.draw(size // 2) if self._measurement.needs_two_batches else None
        batch = self.pool.draw(size - size // 2 if own is not None else size)
        shapes = [batch_shape(b) for b in (own, batch) if b is not None]
        # Other signals' passes are their own affair: the first probe is counted, the others are taken to cost alike.
        # Counting takes longer than a small probe does.
        is_known = self._ratio is not None or (own is not None and not gradient_norm)
        counter = nullcontext() if is_known or spending.costs is None else flop_counter()
        with counter:
            self._measurement.probe(batch, own=own, step=step, gradient_norm=gradient_norm)
        if isinstance(counter, FlopCounterMode):
            self._ratio = counter.get_total_flops() / self._flops(shapes)
        self._last = (step, progress)
        self.history.append((step, self._measurement.error_map.values()))
        spending.ledger.add_probe(flops=self._flops(shapes), seconds=time.perf_counter() - started)
        return True

    def _flops(self, shapes: Sequence[tuple[int, int]]) -> float:
        costs = self._spending.costs
        if costs is None:
            return 0.0
        passes = sum(costs.probe_flops(*shape, weights=True) for shape in shapes)
        # The step that the optimizer would make is found out for every component.
        makes_step = self._measurement is not None and self._measurement.signal.needs_update
        step = sum(self._spending.optimizer_flops.values()) if makes_step else 0.0
        return passes * (1.0 if self._ratio is None else self._ratio) + step

    def _fits(self, flops: float, pays: Callable[[float], bool]) -> bool:
        share = self._settings.max_fraction * self._spending.allowed if self.schedule.number else math.inf
        # Half a probe of tolerance: examples differ in length.
        return self._spending.ledger.probe_flops + 0.5 * flops <= share and pays(flops)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [[step, values] for step, values in self.history],
            "last": self._last,
            "ratio": self._ratio,
            "pool": self.pool.state_dict() if self.pool else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`; the pool's place by `restore_place`, once there is a pool."""
        self.history = [(step, dict(values)) for step, values in state["history"]]
        self._last, self._ratio = tuple(state["last"]), state["ratio"]

    def restore_place(self, state: dict[str, Any]) -> None:
        if self.pool is not None and state["pool"] is not None:
            self.pool.load_state_dict(state["pool"])
