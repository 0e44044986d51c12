"""What a run may spend, has spent, and can still pay for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from rgft.cost import CostModel, StepCost
from rgft.errors import BudgetError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.length_groups import LengthGroups, PartOfBatch
from rgft.pace import PacedLimit
from rgft.plan import Budget, UpdatePlan
from rgft.telemetry.energy import EnergyMeter
from rgft.telemetry.ledger import Ledger, Skipped
from rgft.workload import Workload, batch_shape

NOTHING_SKIPPED = Skipped()


class Spending:
    """The FLOPs, seconds and joules of a run: allowed, booked and still to be had. Before `allow`, nothing is limited.

    Seconds and joules are turned into FLOPs at the pace of the run's own last steps; before the first, at that of the
    machine.

    Args:
        budget: None does not limit; the ledger is kept all the same.
        cache: activations known already make passes cheaper.

    Attributes:
        ledger: all that was spent.
        costs: FLOPs of any plan on this model.
        full: FLOPs of full fine-tuning of the same run.
        typical: (rows, tokens) of a typical batch.
        typical_of_steps: the same, of what training steps compute of it.
        groups: takes batches apart into rows of like length; None: steps pass them whole.
        count: targets of a batch, where steps compute what they can at these alone; else None.
        accumulation: micro-batches per optimizer step; a step is begun only if all of them are paid for.
        meter: of energy; None: none is booked.
        optimizer_flops: component → FLOPs of products in the optimizer's own step (Muon's); others make none.
        occasional_flops: number of a step → FLOPs of products that the optimizer makes beside in that step (GaLore's
            singular value decompositions); None: it never does.
        kept_rows, kept_targets: shares of typical batches that come up, where well-learnt ones are skipped.
    """

    def __init__(self, budget: Budget | None, cache: ActivationCache | None) -> None:
        self.is_limited = budget is not None and budget.is_spent
        self._share = 1.0 if budget is None or budget.flops is None else budget.flops
        self._counts_flops = budget is not None and budget.flops is not None
        self._seconds = PacedLimit(None if budget is None else budget.seconds)
        self._joules = PacedLimit(None if budget is None else budget.joules)
        # Those that limit, and what was spent of each.
        known = ((self._seconds, attrgetter("elapsed")), (self._joules, attrgetter("spent_joules")))
        self._paced = [(paced, spent) for paced, spent in known if paced.limit is not None]
        self.meter: EnergyMeter | None = None
        self._cache = cache
        self.ledger = Ledger()
        self.costs: CostModel | None = None
        self._drops = True
        self.full = self._of_data = self._allowed_flops = math.inf
        self.typical = self.typical_of_steps = (1, 1)
        self._smallest = self._largest = (1, 1)
        self.groups: LengthGroups | None = None
        self.count: Callable[[Any], int] | None = None
        self._largest_target_share = 1.0
        self.accumulation = 1
        self.optimizer_flops: dict[str, float] = {}
        self.occasional_flops: Callable[[int], float] | None = None
        self.kept_rows = self.kept_targets = 1.0

    @property
    def is_cached(self) -> bool:
        """Whether an activation cache keeps what lies below the cut."""
        return self._cache is not None and self._cache.is_usable

    @property
    def needs_pace(self) -> bool:
        """Whether `allow` wants to know how fast the machine is."""
        return any(paced.pace is None for paced, _ in self._paced)

    def allow(self, costs: CostModel, workload: Workload, *, full: float | None, pace: float | None = None) -> None:
        """Fixes what the run may spend: the budget's share of `full`, or of fully fine-tuning on the workload.

        Args:
            costs, workload: of the run.
            full: FLOPs of full fine-tuning; None: of this model on this workload.
            pace: FLOPs per second to reckon with before the first step, where seconds or joules are limited.
        """
        self.costs = costs.with_dropout(self._drops)
        self.typical, self.typical_of_steps = workload.typical, workload.typical_of_steps
        self._smallest, self._largest = (pick(workload.shapes, key=math.prod) for pick in (min, max))
        self._largest_target_share = workload.largest_target_share
        of_data = workload.full_flops(costs)
        self.full = of_data if full is None else full
        self._of_data = of_data if workload.is_exact else math.inf
        self._allowed_flops = self.full * self._share
        if self.meter is not None:
            self.meter.begin(self.ledger.seconds)
        if pace is not None:
            self._seconds.pace = self._seconds.pace or pace
            watts = self.meter.watts if self.meter is not None else None
            self._joules.pace = self._joules.pace or (pace / watts if watts else None)

    def reckon_with_dropout(self, drops: bool) -> None:
        """From here on steps are made with the model's dropout, or without."""
        self._drops = drops
        if self.costs is not None:
            self.costs = self.costs.with_dropout(drops)

    def require(self, plan: UpdatePlan, workload: Workload) -> float:
        """Makes sure that a first step on any batch of the workload can be paid for; returns its FLOPs.

        Args:
            plan: the cheapest.
            workload: of the run.

        Raises:
            BudgetError: the budget is smaller.
        """
        assert self.costs is not None
        # Of the largest batch, for whichever comes first must fit; with a cache it has to prove that padding is unread.
        dx_into = 0 if self._cache is None else plan.cut
        largest = max(
            self._step(
                plan, 0, rows, tokens, cached_below=0, targets=self._most_targets(rows, tokens), dx_into=dx_into
            )
            for rows, tokens in workload.shapes
        )  # fmt: skip
        others = min(self.accumulation, workload.batches) - 1
        typical = self._step(plan, 0, *self.typical, cached_below=0) if others else 0.0
        flops = self._of_optimizer(plan.active(0), step=0) + largest + others * typical
        for paced, unit in ((self._seconds, "s"), (self._joules, "J")):
            needed = paced.amount_of(flops)
            if needed is not None and paced.limit is not None and needed > 2.0 * paced.limit:  # the pace is a guess
                raise BudgetError(
                    f"the budget of {paced.limit:g} {unit} is less than a step of the cheapest plan takes here, about "
                    f"{needed:.3g} {unit}{self._of_so_many}"
                )
        if self._counts_flops and self._allowed_flops < flops:
            smallest = math.ceil(1e4 * flops / self.full) / 1e4
            raise BudgetError(
                f"the budget of {self._share:.4g} of full fine-tuning buys {self._allowed_flops:.3g} FLOPs, less than "
                f"one step of the cheapest plan ({flops:.3g}){self._of_so_many}; the smallest budget of this run is "
                f"{smallest:.4f}"
            )
        return flops

    @property
    def _of_so_many(self) -> str:
        return f" of {self.accumulation} micro-batches" if self.accumulation > 1 else ""

    def full_steps(self, batches: int) -> int:
        """How many optimizer steps of full fine-tuning on typical batches are allowed; all of them without a limit.

        Args:
            batches: micro-batches of the run.
        """
        assert self.costs is not None
        if not self.is_limited:
            return math.ceil(batches / self.accumulation)
        passes = self.accumulation * self.costs.full_step(*self.typical).total
        of_step = passes + self._of_optimizer(self.optimizer_flops)
        steps = max(1, round(self.allowed / of_step))
        if self.occasional_flops is not None:
            beside = sum(map(self.occasional_flops, range(steps)))
            steps = max(1, round((self.allowed - beside) / of_step))
        return steps

    # ---------------------------------------------------------------- booking

    def book_pass(
        self, active: Collection[str], *, rows: int, tokens: int, cached_below: int, targets: int | None = None,
        dx_into: int = 0, skipped: Skipped = NOTHING_SKIPPED,
    ) -> None:  # fmt: skip
        """A training pass with `active` on, below `cached_below` read from the cache.

        Args:
            active, cached_below: of the plan.
            rows, tokens: of the batch.
            targets: at which the head was computed; None: at all positions.
            dx_into: see `CostModel.step_flops`.
            skipped: what the batch had beside that.
        """
        if self.costs is not None:
            whole = rows + skipped.rows
            at = whole * tokens if targets is None else targets + skipped.targets + skipped.row_targets
            spent, all_positions = (
                costs.step_flops(
                    active, rows=whole, tokens=tokens, cached_below=cached_below, targets=at, dx_into=dx_into
                )
                for costs, at in ((self.costs, at), (self.costs.without_skipping, whole * tokens))
            )
            self.ledger.add_forward(
                full=self.costs.full_step(whole, tokens), rows=whole, tokens=whole * tokens, spent=spent,
                all_positions=all_positions,
            )  # fmt: skip
            if skipped.rows or skipped.targets:
                of_rows, of_both = (
                    self.costs.step_flops(
                        active, rows=rows, tokens=tokens, cached_below=cached_below, targets=at, dx_into=dx_into
                    )
                    for at in ((rows * tokens,) * 2 if targets is None else (targets + skipped.targets, targets))
                )
                self.ledger.add_skipped(
                    skipped, tokens=skipped.rows * tokens, examples=_difference(spent, of_rows),
                    targets=_difference(of_rows, of_both),
                )  # fmt: skip

    def book_padding(self, batch: Any, parts: Sequence[PartOfBatch]) -> None:
        """What full fine-tuning would spend on the padding that a batch in parts is spared."""
        if self.costs is not None:
            whole, *others = (self.costs.full_step(*batch_shape(b)).total for b in (batch, *(p.batch for p in parts)))
            self.ledger.add_padding(flops=whole - sum(others))

    def book_fill(self, rows: Mapping[int, int], tokens: int, *, below: int, seconds: float) -> None:
        """Forward passes that filled the cache up to a cut: rows by the cut that they were read at."""
        if self.costs is not None:
            self.ledger.add_fill(flops=self._filling(rows, tokens, below=below), seconds=seconds)

    def _filling(self, rows: Mapping[int, int], tokens: int, *, below: int) -> float:
        assert self.costs is not None
        return sum(
            self.costs.forward_flops(number, tokens, below=below, cached_below=level)
            for level, number in rows.items()
            if level < below
        )

    def book_dry_step(self, active: Collection[str]) -> None:
        """What finding out an optimizer's step costs, beside making it."""
        self.ledger.add_scoring(flops=self._of_optimizer(active), seconds=0.0)

    def end_step(self, *, step: int, seconds: float, updated: Mapping[str, int]) -> None:
        """The end of that step; see `Ledger.end_step`."""
        ledger = self.ledger
        ledger.end_step(seconds=seconds, updated=updated, optimizer_flops=self._of_optimizer(updated, step=step))
        if self.meter is not None:
            ledger.add_energy(self.meter.spent(ledger.seconds))
        for paced, spent in self._paced:
            paced.observe(ledger.spent_flops, spent(ledger), steps=ledger.steps)

    # ---------------------------------------------------------------- what is left

    @property
    def allowed(self) -> float:
        """FLOPs of the whole run; where seconds or joules are limited, what they are going to buy."""
        ledger = self.ledger
        left = [paced.flops_left(spent(ledger)) for paced, spent in self._paced]
        return min([self._allowed_flops, *(ledger.spent_flops + flops for flops in left if flops is not None)])

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
        shares += [spent(self.ledger) / paced.limit for paced, spent in self._paced if paced.limit is not None]
        return max(shares, default=0.0)

    def pays_for(
        self, plan: UpdatePlan, step: int, batch: Any, ids: Sequence[int] | None, *, batches: int, is_hit: bool,
        beside: float = 0.0,
    ) -> bool:  # fmt: skip
        """Whether it still pays for a step on such batches, and for `beside` FLOPs.

        Args:
            plan: in force then.
            step: its number.
            batch: the first of its micro-batches; None: a typical one, unknown to the cache.
            ids: which examples its rows are.
            batches: micro-batches of the step.
            is_hit: whether the cache knows the others.
        """
        if self.costs is None or not self.is_limited:
            return True
        if batch is None:
            return beside + self._typical(plan, step, cached_below=0) <= self.left
        parts = None if self.groups is None else self.groups.parts(batch)
        passes = [(batch, ids)] if parts is None else [(part.batch, part.ids_of(ids)) for part in parts]
        flops = sum(self._of_pass(plan, step, part, ids) for part, ids in passes)
        of_optimizer = self._of_optimizer(plan.active_set(step), step=step)
        others = 0.0
        if batches > 1:  # whatever they are: a step that was begun is ended
            targets = self._most_targets(*self._largest)
            most = self._step(plan, step, *self._largest, cached_below=plan.cut if is_hit else 0, targets=targets)
            others = min(
                (batches - 1) * max(flops, most), self._rest_after(batch) * max(1.0, flops / self._whole(batch))
            )
        return beside + flops + others + of_optimizer <= self.left

    def _whole(self, batch: Any) -> float:
        """FLOPs of full fine-tuning on the batch."""
        assert self.costs is not None
        return self.costs.full_step(*batch_shape(batch)).total

    def _rest_after(self, batch: Any) -> float:
        """The same, on all the data that come after it; infinite where they are known by a sample only."""
        return max(0.0, self._of_data - self.ledger.reference_flops - self._whole(batch))

    def _of_pass(self, plan: UpdatePlan, step: int, batch: Any, ids: Sequence[int] | None) -> float:
        """FLOPs of a pass over the batch, and of filling the cache before it."""
        rows, tokens = batch_shape(batch)
        fill, cached_below, dx_into = 0.0, 0, 0
        if self._cache is not None and ids is not None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            dx_into = plan.cut if plan.cut and self._cache.lacks_proof(ids, mask, tokens) else 0
            known = self._cache.rows_by_level(ids, mask, tokens) if self._cache.cut == plan.cut else {0: []}
            if len(known) == 1:
                (cached_below,) = known
            else:
                cached_below = plan.cut
                fill = self._filling({level: len(some) for level, some in known.items()}, tokens, below=plan.cut)
        targets = self.count(batch) if self.count is not None else None
        if targets is not None and self.accumulation > 1:  # of the other micro-batches it is not known yet
            targets = self._most_targets(rows, tokens)
        return fill + self._step(
            plan, step, rows, tokens, cached_below=cached_below, targets=targets, dx_into=dx_into
        )  # fmt: skip

    def pays_for_another(self, plan: UpdatePlan, step: int, *, is_hit: bool) -> bool:
        """Whether it still pays for a step on typical batches, which the cache knows or does not.

        Where all of full fine-tuning is allowed, on the smallest: the batches at the end of the data may be such.
        """
        if self.costs is None or not self.is_limited:
            return True
        cached_below = plan.cut if is_hit else 0
        flops = self._typical(plan, step, cached_below=cached_below)
        if self._counts_flops and self._share >= 1.0:
            smallest = self._step(plan, step, *self._smallest, cached_below=cached_below)
            flops = min(flops, smallest + self._of_optimizer(plan.active_set(step), step=step))
        return flops <= self.left

    def steps_left(self, plan: UpdatePlan, step: int, *, new: float = math.inf) -> float:
        """How many steps of the plan it pays for, on typical batches; a cache knows those after the first `new`."""
        if self.costs is None or not self.is_limited:
            return math.inf
        flops = self._typical(plan, step, cached_below=0)
        if self.left <= new * flops or not self.is_cached:
            return self.left / flops
        again = self._typical(plan, step, cached_below=plan.cut)
        return new + (self.left - new * flops) / again if again else math.inf

    def _typical(self, plan: UpdatePlan, step: int, *, cached_below: int) -> float:
        """FLOPs of a step on what comes up of typical batches."""
        assert self.costs is not None
        rows, tokens = self.typical_of_steps
        targets = None
        if not self.kept_rows == self.kept_targets == 1.0:
            targets = round(self.kept_targets * self.costs.target_share * rows * tokens)
        # By row all costs are the same: what is skipped is on average that share of them.
        passes = self.kept_rows * self._step(plan, step, rows, tokens, cached_below=cached_below, targets=targets)
        return self.accumulation * passes + self._of_optimizer(plan.active_set(step), step=step)

    def _of_optimizer(self, active: Iterable[str], *, step: int | None = None) -> float:
        """Of any step, or of that step, in which the optimizer may do more."""
        beside = 0.0 if step is None or self.occasional_flops is None else self.occasional_flops(step)
        return beside + sum(self.optimizer_flops.get(name, 0.0) for name in active) if self.optimizer_flops else beside

    def _step(
        self, plan: UpdatePlan, step: int, rows: int, tokens: int, *, cached_below: int, targets: int | None = None,
        dx_into: int = 0,
    ) -> float:  # fmt: skip
        assert self.costs is not None
        return self.costs.step_flops(
            plan.active_set(step), rows=rows, tokens=tokens, cached_below=cached_below, targets=targets,
            dx_into=dx_into, low_rank=plan.pairs,
        ).total  # fmt: skip

    def _most_targets(self, rows: int, tokens: int) -> int:
        return math.ceil(self._largest_target_share * rows * tokens)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        return {
            "ledger": self.ledger.to_dict(), "seconds": self._seconds.state_dict(),
            "joules": self._joules.state_dict(), "drops": self._drops,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ledger = Ledger.from_dict(state["ledger"])
        self._seconds.load_state_dict(state["seconds"])
        self._joules.load_state_dict(state["joules"])
        self.reckon_with_dropout(state.get("drops", True))
        if self.meter is not None:
            self.meter.begin(self.ledger.seconds)


def _difference(more: StepCost, less: StepCost) -> StepCost:
    return StepCost(
        forward=more.forward - less.forward, dx=more.dx - less.dx, dw=more.dw - less.dw, head=more.head - less.head,
        recomputed=more.recomputed - less.recomputed, pairs=more.pairs - less.pairs,
    )  # fmt: skip
