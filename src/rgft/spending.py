"""What a run may spend, has spent, and can still pay for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rgft.cost import CostModel
from rgft.errors import BudgetError
from rgft.execution.activation_cache import ActivationCache
from rgft.plan import Budget, UpdatePlan
from rgft.telemetry.ledger import Ledger
from rgft.workload import Workload, batch_shape


class Spending:
    """The FLOPs of a run: allowed, booked and still to be had. Before `allow`, nothing is limited and nothing known.

    Args:
        budget: None does not limit; the ledger is kept all the same.
        cache: activations known already make passes cheaper.

    Attributes:
        ledger: all that was spent.
        costs: FLOPs of any plan on this model.
        full: FLOPs of full fine-tuning of the same run.
        allowed: FLOPs of this one.
        typical: (rows, tokens) of a typical batch.
        accumulation: micro-batches per optimizer step; a step is begun only if all of them are paid for.
    """

    def __init__(self, budget: Budget | None, cache: ActivationCache | None) -> None:
        self.is_limited = budget is not None
        self._share = 1.0 if budget is None else budget.flops
        self._cache = cache
        self.ledger = Ledger()
        self.costs: CostModel | None = None
        self.full = self.allowed = math.inf
        self.typical = (1, 1)
        self.accumulation = 1

    def allow(self, costs: CostModel, workload: Workload, *, full: float | None) -> None:
        """Fixes what the run may spend: the budget's share of `full`, or of fully fine-tuning on the workload."""
        self.costs, self.typical = costs, workload.typical
        self.full = workload.full_flops(costs) if full is None else full
        self.allowed = self.full * self._share

    def require(self, active: Collection[str], workload: Workload) -> None:
        """Makes sure that a step on any batch of the workload can be paid for, with only `active` on.

        Raises:
            BudgetError: the budget is smaller.
        """
        assert self.costs is not None
        # Of the largest batch, for whichever comes first must fit.
        flops = max(self.costs.step_flops(active, rows=rows, tokens=tokens).total for rows, tokens in workload.shapes)
        if self.is_limited and self.allowed < flops:
            smallest = math.ceil(1e4 * flops / self.full) / 1e4
            raise BudgetError(
                f"the budget of {self._share:.4g} of full fine-tuning buys {self.allowed:.3g} FLOPs, less than one "
                f"step of the cheapest plan ({flops:.3g}); the smallest budget of this run is {smallest:.4f}"
            )

    # ---------------------------------------------------------------- booking

    def book_pass(self, active: Collection[str], *, rows: int, tokens: int, cached_below: int) -> None:
        """A training pass with `active` on, below `cached_below` read from the cache."""
        if self.costs is not None:
            self.ledger.add_forward(
                full=self.costs.full_step(rows, tokens), rows=rows, tokens=rows * tokens,
                spent=self.costs.step_flops(active, rows=rows, tokens=tokens, cached_below=cached_below),
            )  # fmt: skip

    def book_fill(self, rows: int, tokens: int, *, below: int, seconds: float) -> None:
        """A forward pass that filled the cache."""
        if self.costs is not None:
            self.ledger.add_fill(flops=self.costs.forward_flops(rows, tokens, below=below), seconds=seconds)

    # ---------------------------------------------------------------- what is left

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
        return self.ledger.spent_flops / self.allowed if self.is_limited else 0.0

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
        flops = fill + self._step(plan, step, rows, tokens, is_hit=hit)
        return beside + self.accumulation * flops <= self.left

    def pays_for_typical(self, plan: UpdatePlan, step: int, *, is_hit: bool) -> bool:
        """Whether it still pays for a step on typical batches, which the cache knows or does not."""
        if self.costs is None or not self.is_limited:
            return True
        return self.accumulation * self._step(plan, step, *self.typical, is_hit=is_hit) <= self.left

    def _step(self, plan: UpdatePlan, step: int, rows: int, tokens: int, *, is_hit: bool) -> float:
        assert self.costs is not None
        below = plan.cut if is_hit else 0
        return self.costs.step_flops(plan.active(step), rows=rows, tokens=tokens, cached_below=below).total
