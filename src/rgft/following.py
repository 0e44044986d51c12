"""What tensors really held in some steps of a run, to be compared with its memory budget."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rgft.cost.peak import PeakMemory
from rgft.guide import Guide

#: Steps that are followed at most: the first, the first under each new plan, and the first that is averaged.
MAX_FOLLOWED = 6


class StepsFollowed:
    """Follows some steps of a guided run on the CPU, where no allocator tells the peak. A context: left, it stops.

    Args:
        guide: of the run; without a memory budget nothing is followed.
        is_on_cpu: where the model is.
    """

    def __init__(self, guide: Guide, *, is_on_cpu: bool) -> None:
        self._guide, self._is_on_cpu = guide, is_on_cpu
        self._followed: set[tuple[int, bool]] = set()  # number of plans so far, whether weights are averaged
        self._peak: PeakMemory | None = None

    def begin_step(self) -> None:
        """Before all that belongs to a step: probes and decisions, too."""
        guide = self._guide
        state = (len(guide.plans), guide.is_averaging)
        is_limited = guide.run_plan is not None and guide.run_plan.memory is not None
        if is_limited and self._is_on_cpu and state not in self._followed and len(self._followed) < MAX_FOLLOWED:
            self._followed.add(state)
            cached = guide.cache.bytes if guide.cache is not None and guide.cache.place == "memory" else 0
            self._peak = PeakMemory(guide.kept_tensors(), beside=cached)
            self._peak.__enter__()

    def end_step(self) -> None:
        """After the optimizer's step, before gradients are freed."""
        if self._peak is not None:
            self._peak.__exit__(None, None, None)
            self._guide.ledger.add_step_peak(self._peak.peak)
            self._peak = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peak is not None:
            self._peak.__exit__(kind, error, trace)
            self._peak = None
