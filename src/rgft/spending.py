"""What a run may spend, has spent, and can still pay for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rgft.cost import CostModel, StepCost
from rgft.errors import BudgetError
from rgft.execution.activation_cache import ActivationCache
from rgft.plan import Budget, UpdatePlan
from rgft.telemetry.ledger import Ledger, Skipped
from rgft.workload import Workload, batch_shape

#: Weight of what was known in the running pace, per step: about the last five steps count.
PACE_MEMORY = 0.8
NOTHING_SKIPPED = Skipped()


class Spending:
    """The FLOPs and seconds of a run: allowed, booked and still to be had. Before `allow`, nothing is limited.

    Seconds are turned into FLOPs at the pace of the run's own last steps; before the first, at the machine's.

    Args:
        budget: None does not limit; the ledger is kept all the same.
        cache: activations known already make passes cheaper.

    Attributes:
        ledger: all that was spent.
        costs: FLOPs of any plan on this model.
        full: FLOPs of full fine-tuning of the same run.
        typical: (rows, tokens) of a typical batch.
        count: targets of a batch, where steps compute what they can at these alone; else None.
        accumulation: micro-batches per optimizer step; a step is begun only if all of them are paid for.
        kept_rows, kept_targets: shares of typical batches that come up, where well-learnt ones are skipped.
    """

    def __init__(self, budget: Budget | None, cache: ActivationCache | None) -> None:
        self.is_limited = budget is not None and budget.is_spent
        self._share = 1.0 if budget is None or budget.flops is None else budget.flops
        self._counts_flops = budget is not None and budget.flops is not None
        self._seconds = None if budget is None else budget.seconds
        self._pace: float | None = None  # FLOPs per second, of the last steps
        self._seen = (0.0, 0.0)  # FLOPs and seconds booked before the step in hand
        self._cache = cache
        self.ledger = Ledger()
        self.costs: CostModel | None = None
        self.full = self._allowed_flops = math.inf
        self.typical = (1, 1)
        self.count: Callable[[Any], int] | None = None
        self._largest_target_share = 1.0
        self.accumulation = 1
        self.kept_rows = self.kept_targets = 1.0

    @property
    def needs_pace(self) -> bool:
        """Whether `allow` wants to know how fast the machine is."""
        return self._seconds is not None and self._pace is None

    def allow(self, costs: CostModel, workload: Workload, *, full: float | None, pace: float | None = None) -> None:
        """Fixes what the run may spend: the budget's share of `full`, or of fully fine-tuning on the workload.

        Args:
            costs, workload: of the run.
            full: FLOPs of full fine-tuning; None: of this model on this workload.
            pace: FLOPs per second to reckon with before the first step, where seconds are limited.
        """
        self.costs, self.typical = costs, workload.typical
        self._largest_target_share = workload.largest_target_share
        self.full = workload.full_flops(costs) if full is None else full
        self._allowed_flops = self.full * self._share
        if self._seconds is not None and self._pace is None:
            self._pace = pace

    def require(self, active: Collection[str], workload: Workload) -> None:
        """Makes sure that a step on any batch of the workload can be paid for, with only `active` on.

        Raises:
            BudgetError: the budget is smaller.
        """
        assert self.costs is not None
        # Of the largest batch, for whichever comes first must fit.
        flops = max(
            self.costs.step_flops(
                active, rows=rows, tokens=tokens, targets=self._most_targets(rows, tokens)
            ).total
            for rows, tokens in workload.shapes
        )  # fmt: skip
        if self._seconds is not None and self._pace is not None and flops > 2.0 * self._seconds * self._pace:
            raise BudgetError(
                f"the budget of {self._seconds:g} s is less than a step of the cheapest plan takes here, about "
                f"{flops / self._pace:.3g} s"
            )
        if self._counts_flops and self._allowed_flops < flops:
            smallest = math.ceil(1e4 * flops / self.full) / 1e4
            raise BudgetError(
                f"the budget of {self._share:.4g} of full fine-tuning buys {self._allowed_flops:.3g} FLOPs, less than "
                f"one step of the cheapest plan ({flops:.3g}); the smallest budget of this run is {smallest:.4f}"
            )

    def full_steps(self, batches: int) -> int:
        """How many steps of full fine-tuning on typical batches are allowed; all `batches` without a limit."""
        assert self.costs is not None
        if not self.is_limited:
            return batches
        return max(1, round(self.allowed / self.costs.full_step(*self.typical).total))

    # ---------------------------------------------------------------- booking

    def book_pass(
        self, active: Collection[str], *, rows: int, tokens: int, cached_below: int, targets: int | None = None,
        skipped: Skipped = NOTHING_SKIPPED,
    ) -> None:  # fmt: skip
        """A training pass with `active` on, below `cached_below` read from the cache.

        Args:
            active, cached_below: of the plan.
            rows, tokens: of the batch.
            targets: at which the head was computed; None: at all positions.
            skipped: what the batch had beside that.
        """
        if self.costs is not None:
            whole = rows + skipped.rows
            at = whole * tokens if targets is None else targets + skipped.targets + skipped.row_targets
            spent, all_positions = (
                costs.step_flops(active, rows=whole, tokens=tokens, cached_below=cached_below, targets=at)
                for costs, at in ((self.costs, at), (self.costs.without_skipping, whole * tokens))
            )
            self.ledger.add_forward(
                full=self.costs.full_step(whole, tokens), rows=whole, tokens=whole * tokens, spent=spent,
                all_positions=all_positions,
            )  # fmt: skip
            if skipped.rows or skipped.targets:
                of_rows, of_both = (
                    self.costs.step_flops(active, rows=rows, tokens=tokens, cached_below=cached_below, targets=at)
                    for at in ((rows * tokens,) * 2 if targets is None else (targets + skipped.targets, targets))
                )
                self.ledger.add_skipped(
                    skipped, tokens=skipped.rows * tokens, examples=_difference(spent, of_rows),
                    targets=_difference(of_rows, of_both),
                )  # fmt: skip

    def book_fill(self, rows: int, tokens: int, *, below: int, seconds: float) -> None:
        """A forward pass that filled the cache."""
        if self.costs is not None:
            self.ledger.add_fill(flops=self.costs.forward_flops(rows, tokens, below=below), seconds=seconds)

    def end_step(self, *, seconds: float, updated: Mapping[str, int]) -> None:
        """A step's end; see `Ledger.end_step`."""
        ledger = self.ledger
        ledger.end_step(seconds=seconds, updated=updated)
        flops, elapsed = ledger.spent_flops - self._seen[0], ledger.elapsed - self._seen[1]
        self._seen = (ledger.spent_flops, ledger.elapsed)
        if self._seconds is not None and flops > 0.0 and elapsed > 0.0:
            pace = flops / elapsed
            # What the machine was said to do is a guess, and the first step is slow: allocations, choice of kernels.
            is_known = self._pace is not None and ledger.steps > 2
            self._pace = PACE_MEMORY * self._pace + (1.0 - PACE_MEMORY) * pace if is_known and self._pace else pace

    # ---------------------------------------------------------------- what is left

    @property
    def allowed(self) -> float:
        """FLOPs of the whole run; where seconds are limited, what they are going to buy."""
        if self._seconds is None or self._pace is None:
            return self._allowed_flops
        bought = self.ledger.spent_flops + max(0.0, self._seconds - self.ledger.elapsed) * self._pace
        return min(self._allowed_flops, bought)

    @property
    def left(self) -> float:
        """FLOPs that may still be spent."""
        return self.allowed - self.ledger.spent_flops

    @property
    def fraction(self) -> float:
        """What was spent so far, as a share of full fine-tuning."""
        return self.ledger.spent_flops / self.full

    @property
    def share_spent(self) -> float:
        """What was spent so far, as a share of what is allowed; 0 without a limit."""
        shares = [self.ledger.spent_flops / self._allowed_flops] if self._counts_flops else []
        if self._seconds is not None:
            shares.append(self.ledger.elapsed / self._seconds)
        return max(shares, default=0.0)

    def pays_for(
        self, plan: UpdatePlan, step: int, batch: Any, ids: Sequence[int] | None, *, beside: float = 0.0
    ) -> bool:
        """Whether it still pays for a step on such batches, and for `beside` FLOPs.

        Args:
            plan: in force then.
            step: its number.
            batch: the first of its micro-batches; None: a typical one, unknown to the cache.
            ids: which examples its rows are.
        """
        if self.costs is None or not self.is_limited:
            return True
        rows, tokens = self.typical if batch is None else batch_shape(batch)
        fill, hit = 0.0, False
        if self._cache is not None and batch is not None and self._cache.cut == plan.cut:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            unknown = len(self._cache.unknown_rows(ids, mask, tokens)) if ids is not None else rows
            hit = unknown < rows
            fill = self.costs.forward_flops(unknown, tokens, below=plan.cut) if hit and unknown else 0.0
        targets = self.count(batch) if self.count is not None and batch is not None else None
        if targets is not None and self.accumulation > 1:  # of the other micro-batches it is not known yet
            targets = self._most_targets(rows, tokens)
        flops = fill + self._step(plan, step, rows, tokens, is_hit=hit, targets=targets)
        return beside + self.accumulation * flops <= self.left

    def pays_for_typical(self, plan: UpdatePlan, step: int, *, is_hit: bool) -> bool:
        """Whether it still pays for a step on typical batches, which the cache knows or does not."""
        if self.costs is None or not self.is_limited:
            return True
        return self.accumulation * self._typical_step(plan, step, is_hit=is_hit) <= self.left

    def steps_left(self, plan: UpdatePlan, step: int) -> float:
        """How many steps of the plan it pays for, on typical batches that the cache does not know."""
        if self.costs is None or not self.is_limited:
            return math.inf
        return self.left / (self.accumulation * self._typical_step(plan, step, is_hit=False))

    def _typical_step(self, plan: UpdatePlan, step: int, *, is_hit: bool) -> float:
        """FLOPs of a step on what comes up of a typical batch."""
        assert self.costs is not None
        rows, tokens = self.typical
        if self.kept_rows == self.kept_targets == 1.0:
            return self._step(plan, step, rows, tokens, is_hit=is_hit)
        targets = round(self.kept_targets * self.costs.target_share * rows * tokens)
        # By row all costs are the same: what is skipped is on average that share of them.
        return self.kept_rows * self._step(plan, step, rows, tokens, is_hit=is_hit, targets=targets)

    def _step(
        self, plan: UpdatePlan, step: int, rows: int, tokens: int, *, is_hit: bool, targets: int | None = None
    ) -> float:
        assert self.costs is not None
        below = plan.cut if is_hit else 0
        return self.costs.step_flops(
            plan.active_set(step), rows=rows, tokens=tokens, cached_below=below, targets=targets
        ).total

    def _most_targets(self, rows: int, tokens: int) -> int:
        return math.ceil(self._largest_target_share * rows * tokens)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        return {"ledger": self.ledger.to_dict(), "pace": self._pace, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ledger = Ledger.from_dict(state["ledger"])
        self._pace = state["pace"]
        self._seen = (state["seen"][0], state["seen"][1])


def _difference(more: StepCost, less: StepCost) -> StepCost:
    return StepCost(
        forward=more.forward - less.forward, dx=more.dx - less.dx, dw=more.dw - less.dw, head=more.head - less.head,
        recomputed=more.recomputed - less.recomputed,
    )  # fmt: skip
