"""How far a run is in its steps, its data and its budget, and what the budget still pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from rgft.plan import RunPlan, UpdatePlan
from rgft.pruning import KeptRows
from rgft.spending import Spending


class Course(Protocol):
    """Where a run is in its data. `BatchStream` is one; a trainer that owns its batches keeps its own.

    Attributes:
        total_batches: micro-batches of the whole run.
        batches_per_epoch: micro-batches after which examples come again.
        position: micro-batches handed out so far; writable.
        epoch: of the micro-batch handed out last.
    """

    position: int
    batches_per_epoch: int

    @property
    def total_batches(self) -> int: ...
    @property
    def epoch(self) -> int: ...


class Progress:
    """Where a run is.

    Args:
        spending: of the run.

    Attributes:
        step: number of the step in hand, or of the next one.
        run_plan: what is fixed for the run; None before it was prepared.
        course: place in the data; None: unknown.
        upcoming: the batch that the next step starts with; None: unknown.
        ids: which examples the rows of the batch in hand are; None: unknown.
        kept: what was left of the batch announced last; None: no example may be skipped.
        following: the examples of the batch after the one in hand, as far as they are known.
    """

    def __init__(self, spending: Spending) -> None:
        self._spending = spending
        self.step = 0
        self.run_plan: RunPlan | None = None
        self.course: Course | None = None
        self.upcoming: Any = None
        self.ids: Sequence[int] | None = None
        self.kept: KeptRows | None = None
        self.following: Sequence[int] = ()

    def take_following(self) -> Sequence[int]:
        """The examples of the next batch; of several passes over the one in hand, the first alone is told."""
        following, self.following = self.following, ()
        return following

    @property
    def share(self) -> float:
        """Share of the run that is done, 0…1: of the budget or of the epochs, whichever is further."""
        if self.run_plan is None:
            return 0.0
        seen = self.course.position / self.course.total_batches if self.course is not None else 0.0
        return min(1.0, max(self._spending.share_spent, seen))

    @property
    def flops_left(self) -> float | None:
        """What the run may still spend; None before it was prepared."""
        return None if self.run_plan is None else self._spending.left

    def steps_left(self, plan: UpdatePlan) -> float:
        """About how many steps of the plan the budget and the data have left; infinite where neither ends."""
        course, spending = self.course, self._spending
        data = math.inf if course is None else (course.total_batches - course.position) / spending.accumulation
        return min(data, spending.steps_left(plan, self.step))

    def passes(self, plan: UpdatePlan) -> float:
        """About how often the run will have seen each example at its end, under the plan from here on; 1 if unknown."""
        course, accumulation = self.course, self._spending.accumulation
        if course is None:
            return 1.0
        new = max(0, course.batches_per_epoch - course.position) / accumulation
        ahead = accumulation * self._spending.steps_left(plan, self.step, new=new)
        return min(course.position + ahead, course.total_batches) / course.batches_per_epoch

    def steps(self, plan: UpdatePlan) -> float:
        """About how many steps the run will have made at its end, under the plan from here on; infinite if unknown."""
        if self.course is None:
            return math.inf
        return self.passes(plan) * self.course.batches_per_epoch / self._spending.accumulation

    def sees_none_again(self, plan: UpdatePlan) -> bool:
        """Whether the run, under the plan, is over before an example comes for the second time.

        Counted in whole steps, from the first micro-batch of the one in hand.
        """
        course, spending = self.course, self._spending
        if course is None:
            return False
        seen = self.step * spending.accumulation
        paid = spending.steps_left(plan, self.step)
        ahead = course.total_batches - seen
        if math.isfinite(paid):
            ahead = min(ahead, math.floor(paid) * spending.accumulation)
        return seen + ahead <= course.batches_per_epoch

    @property
    def batches_of_step(self) -> int:
        """Micro-batches of the step that the batch in hand begins: fewer than of others where the data end in it."""
        course, accumulation = self.course, self._spending.accumulation
        if course is None or course.position == 0:
            return accumulation
        return max(1, min(accumulation, course.total_batches - course.position + 1))

    def pays_for(self, plan: UpdatePlan, *, beside: float = 0.0) -> bool:
        """Whether the budget pays for a step that begins with the upcoming batch, and for `beside` FLOPs."""
        return self._spending.pays_for(
            plan, self.step, self.upcoming, self.ids, batches=self.batches_of_step, is_hit=self._knows_batches,
            beside=beside,
        )  # fmt: skip

    def is_over(self, plan: UpdatePlan) -> bool:
        """Whether the budget would not pay for another step under the plan, in force then."""
        if self.run_plan is None:
            return False
        return not self._spending.pays_for_another(plan, self.step, is_hit=self._knows_batches)

    @property
    def _knows_batches(self) -> bool:
        """Whether the activation cache knows the batches that come."""
        return self._spending.is_cached and self.course is not None and self.course.epoch > 0
