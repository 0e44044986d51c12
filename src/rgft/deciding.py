"""Deciding when a run goes on: what is scored, when something is decided, and which plan is in force."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rgft.allocation.base import Policy, Situation
from rgft.allocation.selection import decides_every_step, depends_on_map, observations_needed, readout_share
from rgft.components import Partition
from rgft.config import Config
from rgft.error_map import ErrorMap
from rgft.errors import ConfigError
from rgft.measurement import Measurement
from rgft.memory import MemoryKeeper
from rgft.plan import UpdatePlan
from rgft.prober import Prober
from rgft.progress import Progress
from rgft.readout import Readout
from rgft.spending import Spending


class Decisions:
    """The plans of a run.

    Args:
        config: of the run.
        partition: what plans are about.
        policy: decides; None: nothing is ever decided.
        measurement: what is known of components; None: nothing is measured.
        prober, memory, progress, spending: of the run.
        low_rank: components that may be trained by low-rank pairs, and are unless a policy says otherwise.

    Attributes:
        plan: in force.
        plans: all that acted differently, in order.
        is_measuring: whether everything is still on, to be scored.
        has_decided: whether the plan in force was decided.
        follows_map: whether the policy waits for scores.
        readout: what was read of the layers before the first step; None: nothing.
    """

    def __init__(
        self, config: Config, partition: Partition, policy: Policy | None, measurement: Measurement | None,
        prober: Prober, memory: MemoryKeeper | None, progress: Progress, spending: Spending, *,
        low_rank: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._config, self._partition, self._policy = config, partition, policy
        self._measurement, self._prober, self._memory = measurement, prober, memory
        self._progress, self._spending, self._low_rank = progress, spending, low_rank
        self._gradient_norm_squared: float | None = None
        self._scales_by_norm = config.scaling is not None and config.scaling.name == "gradient_normalised"
        self._nothing = ErrorMap.empty(partition.names)
        self._cheapest: UpdatePlan | None = None
        self.readout: Readout | None = None
        self.follows_map = policy is not None and depends_on_map(policy)
        self.has_decided = self._is_held = False
        self.is_measuring = self.follows_map
        self.plans: list[UpdatePlan] = []
        reason = "measuring: everything on" if self.is_measuring else "full fine-tuning"
        self.plan = self._in_form(UpdatePlan.all_on(partition.names, reason=reason))

    # ---------------------------------------------------------------- measuring

    def skip_idle_measuring(self, batches: int, *, epoch: int) -> None:
        """Before the first step: nothing is measured first where too little would be seen to decide anything by.

        The measuring phase scores its own steps, but the first one where scores are of the optimizer's step: the next
        step's gradients judge it. What probes see later is decided by as ever.

        Args:
            batches: of the whole run.
            epoch: of one epoch: repeated examples are not scored.
        """
        spending = self._spending
        if not self.is_measuring or self._policy is None or self._measurement is None or self._progress.step:
            return
        needed, share = observations_needed(self._policy), self._config.warmup_fraction
        steps = math.ceil(share * batches / spending.accumulation) - 1  # the batch in hand counts as seen
        steps = min(steps, epoch // spending.accumulation)
        if math.isfinite(paid := spending.steps_left(self.plan, 0)):
            steps = min(steps, math.ceil(share * paid))
        if needed > 1 and steps - self._measurement.signal.needs_update < needed:
            self.is_measuring = False
            self.plan = replace(self.plan, reason="nothing measured first: too few steps to decide anything by")

    @property
    def error_map(self) -> ErrorMap:
        """The map that the next decision is made from."""
        return self._measurement.error_map if self._measurement else self._nothing

    @property
    def scores_training(self) -> bool:
        """Whether this step's own gradients are scored: free, but only where all components are alike.

        While everything is on they are, until examples repeat (a repeated example is not independent of the step it
        judges). An interval of 1 asks for it at every step.
        """
        return self._scores(self._progress.step)

    @property
    def scores_next(self) -> bool:
        """Whether the next step's gradients may be scored: they judge this step."""
        return self._scores(self._progress.step + 1)

    def _scores(self, step: int) -> bool:
        if self._config.probe.interval == 1:
            return True
        is_fresh = self._progress.course is None or self._progress.course.epoch == 0
        return self.is_measuring and is_fresh and self._prober.scores_step(step)

    @property
    def wants_norm(self) -> bool:
        """Whether training steps tell the norm of the whole gradient: multipliers follow it, and no probe tells it."""
        return self._scales_by_norm and self._prober.pool is None

    def observe_norms(self, norms: Mapping[str, float]) -> None:
        """Takes note of a training step's ‖∇L‖² per component, made with everything on."""
        self._observe_norm(sum(norms.values()))

    def _observe_norm(self, squared: float) -> None:
        old, beta = self._gradient_norm_squared, self._config.error_map.beta
        self._gradient_norm_squared = squared if old is None else beta * old + (1 - beta) * squared

    def probe(self) -> bool:
        """Looks at examples that are never trained on; False where there are none, or the budget has no room for it."""
        is_done = self._prober.probe(
            step=self._progress.step, progress=self._progress.share, gradient_norm=self._scales_by_norm,
            pays=lambda flops: self._progress.pays_for(self.plan, beside=flops),
        )  # fmt: skip
        if is_done and self._measurement is not None and self._measurement.gradient_norm_squared is not None:
            self._observe_norm(self._measurement.gradient_norm_squared)
        return is_done

    # ---------------------------------------------------------------- deciding

    def before_step(self) -> None:
        """Probes when due, and decides when something is known that the plan in force was not made from."""
        if self._policy is None or self._is_held:
            return
        progress, every_step = self._progress, self._config.probe.interval == 1
        fresh = decides_every_step(self._policy) or (every_step and progress.step > 0)
        fresh = fresh or not (self.is_measuring or self.has_decided)
        if self._prober.is_due(progress.step, progress.share):
            fresh = self.probe() or fresh
        if self.is_measuring:
            can_measure = self._measurement is None or self._measurement.is_ready
            is_over = progress.share >= self._config.warmup_fraction and can_measure
            if is_over and not self.error_map.observed:
                self.probe()
            if is_over or not progress.pays_for(self.plan):
                self.is_measuring, fresh = False, True
        if fresh and not self.is_measuring:
            self._decide()

    def _decide(self) -> None:
        decided = self._decided(self.situation())
        pays_for = self._progress.pays_for
        if not pays_for(decided):
            kept = self.plan if self.has_decided and pays_for(self.plan) else self._cheapest
            decided = kept or decided
        if not self.plans or not decided.same_effect(self.plans[-1]):
            self.plans.append(decided)
        self.plan, self.has_decided = decided, True

    def _decided(self, situation: Situation) -> UpdatePlan:
        """What the policy decides, as far as memory holds it."""
        assert self._policy is not None
        decided = self._in_form(self._policy.decide(situation))
        return decided if self._memory is None else self._memory.held(decided)

    def _in_form(self, plan: UpdatePlan) -> UpdatePlan:
        """The plan with the form in which each component is trained, where its policy leaves that open."""
        if plan.low_rank is None:
            return replace(plan, low_rank=self._low_rank) if self._low_rank else plan
        unknown = sorted(plan.pairs.difference(self._low_rank))
        if unknown:
            raise ConfigError(
                f"the plan of step {plan.step} trains {unknown[0]!r} ({len(unknown)} in all) by a low-rank pair, and "
                "there is none; name the component in update.low_rank.components"
            )
        return plan

    def situation(self) -> Situation:
        """All that the next decision depends on."""
        progress, spending, measurement = self._progress, self._spending, self._measurement
        run_plan, course = progress.run_plan, progress.course
        measures_steps = measurement is not None and measurement.signal.needs_update
        rows, tokens = spending.typical_of_steps
        return Situation(
            step=progress.step, components=self._partition.components, error_map=self.error_map,
            total_steps=run_plan.steps if run_plan else None, previous=self.plan if self.has_decided else None,
            seed=self._config.seed, gradient_norm_squared=self._gradient_norm_squared,
            same_batch_map=measurement.same_batch_map if measurement and measures_steps else None,
            costs=spending.costs, flops_left=progress.flops_left,
            flops_allowed=None if run_plan is None else spending.allowed,
            batches=course.total_batches if course else None,
            batches_per_epoch=course.batches_per_epoch if course else None, accumulation=spending.accumulation,
            rows=rows, tokens=tokens,
            is_cached=spending.is_cached, unexplained=self._unexplained,
            lowest_cut=0 if self._memory is None else self._memory.lowest_cut,
        )  # fmt: skip

    @property
    def readout_share(self) -> float:
        """What share of the run's FLOPs the policy gives for a readout before the first step; 0: it wants none."""
        return 0.0 if self._policy is None else readout_share(self._policy)

    @property
    def wants_readout(self) -> bool:
        """Whether there is none yet, and the first decision would look at one."""
        return self.readout_share > 0.0 and self.readout is None and self._progress.step == 0

    @property
    def _unexplained(self) -> Mapping[int, float]:
        if self.readout is None:
            return {}
        layers, readout = self._partition.layers, self.readout
        return {depth: readout.at_most(layer) for depth, layer in enumerate(layers, 1) if layer in readout.unexplained}

    # ---------------------------------------------------------------- what there is at least

    def plan_cheapest(self, steps: int) -> UpdatePlan:
        """Finds the cheapest plan of a run of so many steps, once it is known what that may spend."""
        self._cheapest = self._decision_without_means(steps)
        return self._cheapest

    def _decision_without_means(self, steps: int) -> UpdatePlan:
        """What the policy would do if nothing were known and left to spend: no plan of this run costs less."""
        if self._policy is None:
            return self.plan
        situation = replace(
            self.situation(), step=0, total_steps=steps, error_map=self._nothing, previous=None, flops_left=0.0,
            flops_allowed=self._spending.allowed,
        )  # fmt: skip
        return self._decided(situation)

    @property
    def floor(self) -> UpdatePlan:
        """The plan in force; before the first decision, the cheapest that can be."""
        is_open = self.follows_map and not self.has_decided
        return self._cheapest if is_open and self._cheapest is not None else self.plan

    # ---------------------------------------------------------------- holding, saving

    def keep_to_memory(self) -> None:
        """Turns off in the plan in force what memory, by its own plan, does not hold."""
        if self._memory is not None:
            self.plan = self._memory.held(self.plan)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the plan stays as it is: nothing is probed or decided."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "is_measuring": self.is_measuring,
            "has_decided": self.has_decided,
            "plans": [plan.to_dict() for plan in self.plans],
            "gradient_norm_squared": self._gradient_norm_squared,
            "readout": None if self.readout is None else self.readout.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`, which may hold more."""
        self.plan = UpdatePlan.from_dict(state["plan"])
        self.is_measuring = state["is_measuring"]
        self.has_decided = state["has_decided"]
        self.plans = [UpdatePlan.from_dict(plan) for plan in state["plans"]]
        self._gradient_norm_squared = state["gradient_norm_squared"]
        readout = state.get("readout")
        self.readout = None if readout is None else Readout.from_dict(readout)
