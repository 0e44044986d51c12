"""The guide: measure → decide → act, around a training loop that stays the user's own.

guide = rgft.Guide(model, rgft.Config(budget=0.3))
optimizer = torch.optim.AdamW(guide.param_groups(lr=2e-4))
scheduler = guide.scheduler(optimizer)
for batch in guide.batches(dataset, batch_size=32, collate_fn=collator, epochs=3):
    guide.loss(batch).backward()
    guide.step(optimizer, scheduler)
    optimizer.zero_grad()
guide.detach()
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rgft.allocation.base import Situation
from rgft.allocation.selection import depends_on_map, matching
from rgft.assembly import build_cache, build_policy, build_signal
from rgft.batches import BatchStream, IndexedBatch, SizedDataset, Subset
from rgft.config import Config
from rgft.cost import CostModel, trace_costs, with_targets
from rgft.cost.rates import measure_products
from rgft.error_map import ErrorMap
from rgft.errors import AttachError, ConfigError, NonFiniteError
from rgft.execution.activation_cache import ActivationCache
from rgft.execution.averaging import IterateAverage
from rgft.execution.eager import eager
from rgft.execution.executor import Executor
from rgft.execution.linear import layout_of
from rgft.execution.read_positions import ReadPositions
from rgft.execution.target_positions import TargetLoss
from rgft.execution.views import bind
from rgft.measurement import Measurement
from rgft.memory import MemoryKeeper
from rgft.partition import partition
from rgft.plan import MemoryPlan, RunPlan, UpdatePlan
from rgft.probe_schedule import ProbePool, set_aside
from rgft.prober import Prober
from rgft.schedule import learning_rate_schedule
from rgft.spending import Spending
from rgft.telemetry.ledger import Ledger
from rgft.workload import Workload, batch_shape

log = logging.getLogger("rgft")

#: model, batch → per-example losses [B] or their mean.
Loss = Callable[[nn.Module, Any], Tensor]


#: Kinds of components that every batch reaches (unlike experts).
ALWAYS_REACHED = frozenset({"layer", "attention", "ffn", "head", "ffn_block"})


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


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own `.loss` (Transformers' convention): a scalar, so examples cannot be told apart."""
    return model(**batch).loss


class Guide:
    """Fine-tunes a model where it errs, within a budget.

    Beside its methods it shows `plan` (in force), `plans` (all that acted differently, in order), `error_map`,
    `map_history` (step and values at each probe), `run_plan`, `ledger` and `partition`.

    Args:
        model: changed in place while attached; `detach` (or leaving the context) leaves no trace but trained weights.
        config: a `Config`; None is the preset `rgft`.
        loss: (model, batch) → per-example losses [B] or a scalar; None takes `model(**batch).loss`.
        loss_at_targets: the same loss in a form that computes the model's head at targets alone; training steps use it
            under `execution.positions: auto`, where that changes neither loss nor gradients.

    Raises:
        AttachError: the model has a guide already, or nothing to train.
        PartitionError: the model cannot be split into components.
    """

    def __init__(
        self, model: nn.Module, config: Config | None = None, *, loss: Loss | None = None,
        loss_at_targets: TargetLoss | None = None,
    ) -> None:  # fmt: skip
        if getattr(model, "_rgft_guide", None) is not None:
            raise AttachError("this model has a guide already; call its detach() before attaching another")
        if not any(p.requires_grad for p in model.parameters()):
            raise AttachError("no parameter of the model requires gradients, so there is nothing to fine-tune")
        self.model = model
        self.config = (config or Config()).resolved()
        self._loss = loss or model_loss
        self._target_loss = loss_at_targets
        self._at_targets: Loss | None = None  # the proved form of it
        self._targets: int | None = None  # of the batch whose loss is being computed by it
        self.partition = partition(model, self.config.granularity, ffn_blocks=self.config.ffn_blocks)
        matching(self.partition, self.config.stability.always_on, setting="stability.always_on")
        self._policy = build_policy(self.config)
        signal = build_signal(self.config)
        cache = build_cache(self.config, model, self.partition)
        # Whatever may be refused was refused above, while the model was still as it came.
        self._binding = bind(model, self.partition)
        self._executor = Executor(model, self._binding, moments=self.config.update.moments, cache=cache)
        settings = self.config.error_map
        self._measurement = signal and Measurement(
            model, self._binding, signal, self._mean_loss, beta=settings.beta, bias_correction=settings.bias_correction,
            row_stride=self.config.probe.row_stride,
        )  # fmt: skip
        self._memory = MemoryKeeper.of(model, self._binding, self.config, self._policy, signal)
        self._average = IterateAverage(self._binding, model.buffers())
        self._ends_after_step = False
        self._spending = Spending(self.config.budget, cache)
        self._prober = Prober(self._measurement, self.config.probe, self._spending)
        self._stream: Course | None = None
        self._left_stream: BatchStream | None = None  # what the next `batches` goes on with
        self._ids: Sequence[int] | None = None
        self._in_step = False
        self._passes = 0  # through the model in the step in hand
        self._step_loss: Tensor | None = None
        self._step_started = 0.0
        self._restored: Mapping[str, Any] | None = None
        self._gradient_norm_squared: float | None = None
        self._scales_by_norm = self.config.scaling is not None and self.config.scaling.name == "gradient_normalised"
        self._cheapest: UpdatePlan | None = None
        self._upcoming: Any = None  # the batch that the next step starts with, where known
        # A policy that follows the step alone has nothing to wait for, and decides at every step.
        self._follows_map = self._policy is not None and depends_on_map(self._policy)
        self._has_decided = self._holds_plan = False
        self.is_measuring = self._follows_map
        self.plans: list[UpdatePlan] = []
        self.step_count = 0
        self.run_plan: RunPlan | None = None
        reason = "measuring: everything on" if self.is_measuring else "full fine-tuning"
        self.plan = UpdatePlan.all_on(self.partition.names, reason=reason)
        self._handles = [
            model.register_forward_pre_hook(eager(self._before_forward), with_kwargs=True),
            model.register_forward_hook(eager(self._after_forward), always_call=True),
        ]
        model.__dict__["_rgft_guide"] = self

    # ---------------------------------------------------------------- setting up

    def param_groups(
        self, lr: float, *, weight_decay: float = 0.0, classifier_lr: float | None = None,
        decays: Collection[str] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Parameter groups for any elementwise optimizer: all components, whether on now or not.

        Args:
            lr: learning rate at multiplier 1.
            weight_decay: for weights; biases and norms (one-dimensional parameters) have none.
            classifier_lr: for classifier components; None is `lr` × `config.classifier_lr_multiplier`.
            decays: names of the parameters that decay, as the model shows them now; None: as under `weight_decay`.
        """
        head_rate = lr * self.config.classifier_lr_multiplier if classifier_lr is None else classifier_lr
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for component, parameters in self._binding:
            rate = head_rate if component.kind == "classifier" else lr
            names = self._binding.names[component.name]
            for part, parameter, name in zip(component.slices, parameters, names, strict=True):
                is_decayed = len(part.shape) > 1 if decays is None else name in decays
                decay = weight_decay if is_decayed else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def scheduler(self, optimizer: Optimizer, *, shape: str = "linear", warmup: float = 0.1) -> LRScheduler:
        """A learning-rate schedule over the share of the run that is spent (FLOPs under a budget, else steps).

        Args:
            optimizer: made from `param_groups`.
            shape: "linear" (to 0), "cosine" (to 0) or "constant".
            warmup: share of the run with a linearly rising rate.
        """
        return learning_rate_schedule(optimizer, lambda: self.progress, shape=shape, warmup=warmup)

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Attaches to the optimizer; `step` does it when first called.

        Raises:
            OptimizerError: it cannot work on this granularity.
            AttachError: it lacks parameters of some component, or another optimizer is attached.
        """
        if self._executor.optimizer is optimizer:
            return
        self._executor.set_optimizer(optimizer)
        if self._measurement is not None:
            self._measurement.set_optimizer(optimizer)

    def prepare(
        self, stream: BatchStream, *, full_flops: float | None = None, cost_loss: Loss | None = None,
        own_loss: bool = True, may_split: bool = False,
    ) -> RunPlan:  # fmt: skip
        """Traces costs on a first batch, scans the workload and fixes the run plan. `batches` calls it.

        Args:
            stream: the batches that full fine-tuning of this run would see.
            full_flops: FLOPs of that full fine-tuning; None: of all components of this model, which is right unless
                the model is not the one that would be fully fine-tuned (adapters).
            cost_loss: what costs are traced on, where the loss itself cannot be read off the graph (fused kernels).
            own_loss: whether the passes are made by `loss`. Of another's loss it is not known which positions it reads.
            may_split: whether the loop passes batches in pieces where memory is limited (`MemoryPlan.rows_per_pass`).

        Raises:
            BudgetError: no plan fits the budget.
        """
        example = stream.load(next(stream.indices()))
        traced = example if self._memory is None else self._memory.traceable(example)
        costs = self._traced_costs(traced, cost_loss or self._mean_loss, proves_loss=own_loss and cost_loss is None)
        count = None if self._target_loss is None or self._at_targets is None else self._target_loss.count
        workload, spending = Workload.scan(stream, count), self._spending
        costs, spending.count = replace(costs, target_share=workload.target_share), count
        if self._memory is not None:
            optimizer = self._executor.optimizer
            self._hold(self._memory.choose(
                stream, workload, example, self._mean_loss, optimizer=optimizer, may_split=may_split
            ))  # fmt: skip
            costs = self._memory.costs(costs)
        pace = self._machine_pace() if spending.needs_pace else None
        spending.allow(costs, workload, full=full_flops, pace=pace)
        self._cheapest = self._decision_without_means()
        spending.require(self._cheapest.active(0), workload)
        full_step = costs.full_step(*spending.typical).total
        steps = max(1, round(spending.allowed / full_step)) if spending.is_limited else stream.total_batches
        memory = None if self._memory is None else self._memory.plan
        if self._measurement is not None and self._follows_map:
            self._prober.plan(steps=steps, measuring=self.config.warmup_fraction, examples=len(stream.dataset))
            if memory is not None:
                self._prober.limit(memory.probe_size)
        self.run_plan = RunPlan(
            steps=steps, cache="none" if self._executor.cache is None else self._executor.cache.place,
            probes=self._prober.number(steps), probe_size=self._prober.schedule.size, flops=spending.allowed,
            full_flops=spending.full, reason=self.plan.reason,
            position=None if self._executor.positions is None else self._executor.positions.position,
            head_at_targets=self._at_targets is not None,
            memory=memory,
        )  # fmt: skip
        return self.run_plan

    def _hold(self, plan: MemoryPlan, *, is_restored: bool = False) -> None:
        """Keeps to a memory budget from here on."""
        assert self._memory is not None
        self._memory.put_into_force(plan, is_restored=is_restored)
        self.plan = self._memory.held(self.plan)
        self.ledger.limit_memory(limit=plan.limit, forecast=plan.needed)
        if self.run_plan is not None:
            self.run_plan = replace(self.run_plan, memory=plan)
        if self._spending.costs is not None:
            self._spending.costs = self._memory.costs(self._spending.costs)

    def _traced_costs(self, example: Any, loss: Loss, *, proves_loss: bool) -> CostModel:
        """Costs of any plan; finds on the way which positions the last layer, or the head, need not compute."""

        def traced(loss: Loss = loss) -> CostModel:
            return trace_costs(
                self.model, self.partition, example, loss=loss,
                is_sliceable=lambda module: layout_of(module) is not None,
            )  # fmt: skip

        self._at_targets = None

        if self._executor.positions is not None:
            self._executor.positions.detach()
            self._executor.positions = None
        with self._binding.plain():
            costs = traced()
            if self.config.execution.positions == "all" or not proves_loss:
                return costs
            positions = ReadPositions.find(self.model, self.partition, example, loss)
            if positions is None:
                return self._costs_at_targets(costs, example, traced)
            with positions.skipping():
                costs = costs.with_skipping(traced(), last_layer=len(self.partition.layers))
        self._executor.positions = positions
        return costs

    def _costs_at_targets(self, costs: CostModel, example: Any, traced: Callable[[Loss], CostModel]) -> CostModel:
        """Costs with the head at targets alone, where the loss has such a form that is proved on this model."""
        form = self._target_loss
        found = None if form is None else form.find(self.model, example)
        if form is None or found is None:
            return costs
        of_one = form.placed(form.of_one_position)
        narrowed = with_targets(costs, traced(lambda model, batch: of_one(model, batch).mean()))
        if narrowed is None:
            log.info("positions: the head is computed everywhere: its cost cannot be told from the decoder's")
            return costs
        self._at_targets = found
        return narrowed

    def _machine_pace(self) -> float:
        """FLOPs per second to reckon with before the first step; products alone are about twice as fast."""
        weight = next(self.model.parameters())
        return 0.5 * measure_products(weight.device, weight.dtype)

    def _decision_without_means(self) -> UpdatePlan:
        """What the policy would do if nothing were known and left to spend: no plan of this run costs less."""
        if self._policy is None:
            return self.plan
        nothing = ErrorMap.empty(self.partition.names)
        situation = replace(
            self.situation(), step=0, error_map=nothing, previous=None, flops_left=0.0,
            flops_allowed=self._spending.allowed,
        )  # fmt: skip
        return self._decided(situation)

    def _decided(self, situation: Situation) -> UpdatePlan:
        """What the policy decides, as far as memory holds it."""
        assert self._policy is not None
        decided = self._policy.decide(situation)
        return decided if self._memory is None else self._memory.held(decided)

    # ---------------------------------------------------------------- the plain loop

    def batches(
        self, dataset: SizedDataset, *, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None = None,
        epochs: float = 1, workers: int = 0, full_flops: float | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Collated batches until the budget is spent or the epochs are over, whichever comes first.

        Args:
            dataset: map-style. A small part of it is set aside for probes and never trained on.
            batch_size: examples per batch.
            collate_fn: list of examples → batch; None is torch's default.
            epochs: what full fine-tuning of this run would do; the budget is a share of that.
            workers: worker processes of the loader.
            full_flops: see `prepare`.
        """
        if self._left_stream is None:
            self.open(
                dataset, batch_size=batch_size, collate_fn=collate_fn, epochs=epochs, workers=workers,
                full_flops=full_flops,
            )  # fmt: skip
        stream, self._left_stream = self._left_stream, None
        assert stream is not None
        for indexed in self._awaited(stream):
            self._ids, self._upcoming = indexed.ids, indexed.batch
            if not self.affords_upcoming:
                break
            yield indexed.batch
        self.finish()

    def open(
        self, dataset: SizedDataset, *, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None = None,
        epochs: float = 1, workers: int = 0, full_flops: float | None = None,
    ) -> None:  # fmt: skip
        """Begins the batches (of a resumed run: where it was) and hands out none; the next `batches` does.

        Args:
            dataset, batch_size, collate_fn, epochs, workers, full_flops: see `batches`.
        """
        everything = BatchStream(
            dataset, batch_size=batch_size, collate_fn=collate_fn, epochs=epochs, seed=self.config.seed, workers=workers
        )
        if self.run_plan is None:
            self.prepare(everything, full_flops=full_flops)
        train: Sequence[int] = range(len(dataset))
        if self.probe_examples:
            train, pool = set_aside(len(dataset), self.probe_examples, seed=self.config.seed)
            self._prober.pool = ProbePool(pool, everything.load, seed=self.config.seed)
        self._stream = self._left_stream = BatchStream(
            Subset(dataset, train), batch_size=batch_size, collate_fn=collate_fn, epochs=epochs, seed=self.config.seed,
            workers=workers,
        )  # fmt: skip
        if self._restored is not None:
            self._restore_data(self._restored)

    def _awaited(self, stream: BatchStream) -> Iterator[IndexedBatch]:
        """The stream, with the time that its batches take booked."""
        batches = iter(stream)
        while True:
            started = time.perf_counter()
            indexed = next(batches, None)
            self.ledger.add_data(seconds=time.perf_counter() - started)
            if indexed is None:
                return
            yield indexed

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of the batch, under the plan of this step."""
        if not self._in_step:
            self.begin_step()
        loss = self._training_loss(batch)
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        return loss

    def step(
        self, optimizer: Optimizer, scheduler: LRScheduler | None = None, *, max_grad_norm: float | None = None
    ) -> None:
        """One optimizer step under the plan, with all that is measured beside it.

        Args:
            optimizer: made from `param_groups`.
            scheduler: stepped after it.
            max_grad_norm: clips the gradients' norm, after they were checked and scored. Clipped before, one NaN
                hides which component it came from, and scores shrink.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
        """
        if not self._in_step:
            raise AttachError("step() without loss(): call guide.loss(batch).backward() first")
        self.set_optimizer(optimizer)
        self._executor.apply(self.plan, self.step_count)
        self.before_optimizer_step()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        self.end_step()

    # ---------------------------------------------------------------- the seams for trainers

    @property
    def probe_examples(self) -> int:
        """How many examples `prepare` wants set aside for probes; 0: none."""
        return self._prober.examples

    def follow(self, course: Course, *, pool: ProbePool | None = None) -> None:
        """For trainers that own the batches: says where the run is in them, and what may be probed.

        Call it after `prepare` and before the first step; advance `course.position` with each micro-batch.

        Args:
            course: position and length of the run.
            pool: examples that the trainer never trains on; None: scores come from training batches alone.
        """
        self._stream, self._prober.pool = course, pool

    def announce(self, batch: Any, ids: Sequence[int] | None = None) -> None:
        """Says what the next training batch is, before a step and before each pass (`batches` does it itself).

        Args:
            batch: the batch; before a step of several, the largest.
            ids: which examples its rows are; None: unknown.
        """
        self._upcoming, self._ids = batch, ids

    def begin_piece(self, ids: Sequence[int] | None) -> None:
        """Before a pass over some rows of the batch in hand: says which examples they are."""
        if not self._in_step:
            self.begin_step()  # which looks at what the whole batch costs
        self._ids = ids

    @property
    def announced_ids(self) -> Sequence[int] | None:
        """Which examples the rows of the batch in hand are; None: unknown."""
        return self._ids

    @property
    def affords_upcoming(self) -> bool:
        """Whether the budget pays for a step on the batch announced last, under the cheapest plan it may get."""
        return not self.is_done and self._pays_for(self._floor)

    def begin_step(self) -> None:
        """Probes when due, decides, and puts the plan in force. Uses nothing of the batch that follows."""
        if self._policy is not None and not self._holds_plan:
            self._measure_and_decide()
        if self._memory is not None:
            self._memory.bound_cache(self.cache, self.plan.cut)
        self._executor.apply(self.plan, self.step_count)
        self._average.before_step(self._executor.active)
        self._in_step, self._passes = True, 0
        self._step_started = time.perf_counter()

    def before_optimizer_step(self) -> None:
        """Checks and scores the gradients of this step's batches."""
        if not self._passes:
            raise AttachError(
                f"step {self.step_count}: no training pass went through the guided model, so that its cost is unknown. "
                "Call the model itself, not a submodule of it, and in training mode (model.train())"
            )
        self._check_finite()
        if self._measurement is not None and self._scores_training:
            started = time.perf_counter()
            self._measurement.observe_training(self.step_count)
            self._book_scoring(started)

    def end_step(self) -> None:
        """After the optimizer's step, before gradients are cleared."""
        self._executor.skip_positions(False)
        if self._measurement is not None and self._scores_training:
            started = time.perf_counter()
            self._measurement.observe_own_step(self.step_count)
            self._book_scoring(started)
        self._spending.end_step(
            seconds=time.perf_counter() - self._step_started,
            updated={c.name: c.numel for c in self.partition if c.name in self._executor.active},
        )
        # Progress counts this step: the last of all is averaged, too.
        if self._average.count or self.progress > 1.0 - self.config.update.average_last:
            self._average.after_step(self._executor.active)
        self.step_count += 1
        self._in_step = False
        self._step_loss = None
        if self._ends_after_step:
            self.finish()

    def finish(self) -> None:
        """Ends the run: weights become the mean of the last iterates (`update.average_last`). Called once or more.

        `batches` calls it when the budget is spent or the data is over; not when the loop is left early.
        """
        self._ends_after_step = self._in_step  # the data ended inside an accumulation, whose step is still to come
        if not self._in_step:
            self._average.apply()

    def _book_scoring(self, started: float) -> None:
        """Time spent on scores since `started` is no time of the step that it happened in."""
        now = time.perf_counter()
        self.ledger.add_scoring(seconds=now - started)
        self._step_started += now - started

    # ---------------------------------------------------------------- measure and decide

    @property
    def _scores_training(self) -> bool:
        """Whether this step's own gradients are scored: free, but only where all components are alike.

        While everything is on they are, until examples repeat (a repeated example is not independent of the step it
        judges). An interval of 1 asks for it at every step.
        """
        if self.config.probe.interval == 1:
            return True
        is_fresh = self._stream is None or self._stream.epoch == 0
        return self.is_measuring and is_fresh and self._prober.scores_step(self.step_count)

    def _measure_and_decide(self) -> None:
        fresh = not self._follows_map or (self.config.probe.interval == 1 and self.step_count > 0)
        if self._prober.is_due(self.step_count, self.progress):
            fresh = self._probe() or fresh
        if self.is_measuring:
            knows_steps = not self._measures_steps or self._executor.optimizer is not None
            is_over = self.progress >= self.config.warmup_fraction and knows_steps
            if is_over and not self.error_map.observed:
                self._probe()
            if is_over or not self._pays_for(self.plan):
                self.is_measuring, fresh = False, True
        if fresh and not self.is_measuring:
            decided = self._decided(self.situation())
            if not self._pays_for(decided):
                kept = self.plan if self._has_decided and self._pays_for(self.plan) else self._cheapest
                decided = kept or decided
            if not self.plans or not decided.same_effect(self.plans[-1]):
                self.plans.append(decided)
            self.plan, self._has_decided = decided, True

    def _probe(self) -> bool:
        is_done = self._prober.probe(
            step=self.step_count, progress=self.progress, gradient_norm=self._scales_by_norm,
            pays=lambda flops: self._pays_for(self.plan, beside=flops),
        )  # fmt: skip
        if is_done and self._measurement is not None and self._measurement.gradient_norm_squared is not None:
            self._observe_norm(self._measurement.gradient_norm_squared)
        return is_done

    @property
    def _measures_steps(self) -> bool:
        return self._measurement is not None and self._measurement.signal.needs_update

    def _observe_norm(self, squared: float) -> None:
        old, beta = self._gradient_norm_squared, self.config.error_map.beta
        self._gradient_norm_squared = squared if old is None else beta * old + (1 - beta) * squared

    def situation(self) -> Situation:
        """All that the next decision depends on."""
        rows, tokens = self._spending.typical
        return Situation(
            step=self.step_count, components=self.partition.components, error_map=self.error_map,
            total_steps=self.run_plan.steps if self.run_plan else None,
            previous=self.plan if self._has_decided else None, seed=self.config.seed,
            gradient_norm_squared=self._gradient_norm_squared,
            same_batch_map=self._measurement.same_batch_map if self._measurement and self._measures_steps else None,
            costs=self.costs, flops_left=self.flops_left,
            flops_allowed=None if self.run_plan is None else self._spending.allowed,
            batches=self._stream.total_batches if self._stream else None,
            batches_per_epoch=self._stream.batches_per_epoch if self._stream else None, rows=rows, tokens=tokens,
            lowest_cut=0 if self._memory is None else self._memory.lowest_cut,
        )  # fmt: skip

    def _check_finite(self) -> None:
        norms = self._executor.squared_gradient_norms()
        if not norms:
            raise AttachError(
                f"step {self.step_count}: no active component has a gradient; call backward() on guide.loss(batch)"
            )
        culprit = next((name for name, squared in norms.items() if not math.isfinite(squared)), None)
        if culprit is not None:
            loss = "unknown" if self._step_loss is None else f"{float(self._step_loss):.6g}"
            raise NonFiniteError(
                f"step {self.step_count}: the gradient of {culprit!r} is not finite (loss {loss}); nothing was "
                "updated. Lower the learning rate, or check this step's examples"
            )
        if self.plan.cut > 0:
            self._check_lowest_layer(norms)
        if len(self._executor.active) == len(self.partition) and not (
            self._scales_by_norm and self._prober.pool is not None
        ):
            self._observe_norm(sum(norms.values()))

    def _check_lowest_layer(self, norms: Collection[str]) -> None:
        """What just trains above the cut has a gradient: that is where backward has to come to."""
        lowest = {c.name for c in self.partition if c.depth == self.plan.cut and c.kind in ALWAYS_REACHED}
        lowest &= self._executor.active
        if lowest and lowest.isdisjoint(norms):
            raise AttachError(
                f"step {self.step_count}: the lowest layer that trains got no gradient ({', '.join(sorted(lowest))}). "
                "Reentrant checkpointing gives none above a cut: use use_reentrant=False"
            )

    # ---------------------------------------------------------------- around the model's forward

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model:  # a deep copy, which has the hooks but no guide
            return
        if not (self._in_step and module.training and torch.is_grad_enabled()):
            self._executor.skip_positions(False)
            return
        self._passes += 1
        rows, tokens = batch_shape(kwargs or args)
        started = time.perf_counter()
        filled = self._executor.fill_cache(args, kwargs, self._ids, tokens)
        if filled:
            self._spending.book_fill(filled, tokens, below=self.plan.cut, seconds=time.perf_counter() - started)
        self._executor.skip_positions(self.plan.cut <= len(self.partition.layers))
        hit = self._executor.begin_forward(self._ids, kwargs.get("attention_mask"), tokens)
        self._spending.book_pass(
            self._executor.active, rows=rows, tokens=tokens, cached_below=self.plan.cut if hit else 0,
            targets=self._targets,
        )  # fmt: skip

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.model:
            self._executor.end_forward()

    def _training_loss(self, batch: Any) -> Tensor:
        form, at_targets = self._target_loss, self._at_targets
        if form is None or at_targets is None or not form.applies(self.model):
            return self._mean_loss(self.model, batch)
        self._targets = form.count(batch)
        try:
            return at_targets(self.model, batch).mean()
        finally:
            self._targets = None

    def _mean_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss(model, batch).mean()

    # ---------------------------------------------------------------- what is known

    @property
    def error_map(self) -> ErrorMap:
        """The map that the next decision is made from."""
        return self._measurement.error_map if self._measurement else ErrorMap.empty(self.partition.names)

    @property
    def active(self) -> frozenset[str]:
        """Names of the components that are on in this step."""
        return self._executor.active

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer attached to, if any yet."""
        return self._executor.optimizer

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters of the components that the plan in force updates, if not at every step."""
        return [p for name in self.plan.active() for p in self._binding.parameters[name]]

    @property
    def budget_spent(self) -> float:
        """What was spent so far, as a share of the budget; 0 without one."""
        return self._spending.share_spent

    @property
    def flops_fraction(self) -> float:
        """What was spent so far, as a share of full fine-tuning's FLOPs."""
        return self._spending.fraction

    def summary(self) -> dict[str, Any]:
        """The ledger against full fine-tuning of the same run."""
        return self.ledger.summary(self.run_plan.full_flops if self.run_plan else None)

    @property
    def costs(self) -> CostModel | None:
        """FLOPs of any plan on this model, once `prepare` has traced them."""
        return self._spending.costs

    @property
    def ledger(self) -> Ledger:
        """All that was spent."""
        return self._spending.ledger

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step: a step is begun only if the budget pays for all of them."""
        return self._spending.accumulation

    @accumulation.setter
    def accumulation(self, value: int) -> None:
        self._spending.accumulation = value

    @property
    def map_history(self) -> list[tuple[int, dict[str, float]]]:
        """Step and scores at each probe."""
        return self._prober.history

    @property
    def is_averaging(self) -> bool:
        """Whether means of the weights are kept by now."""
        return self._average.count > 0

    def kept_tensors(self) -> list[Tensor]:
        """All that exists between steps: weights, buffers, optimizer state, means."""
        optimizer = self._executor.optimizer
        state = optimizer.state.values() if optimizer is not None else ()
        moments = [value for values in state for value in values.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *moments, *self._average.tensors()]

    @property
    def cache(self) -> ActivationCache | None:
        """The activation cache, or None."""
        return self._executor.cache

    @property
    def flops_left(self) -> float | None:
        """What the run may still spend; None before `prepare`."""
        return None if self.run_plan is None else self._spending.left

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0…1: of the budget or of the epochs, whichever is further."""
        if self.run_plan is None:
            return 0.0
        seen = self._stream.position / self._stream.total_batches if self._stream is not None else 0.0
        return min(1.0, max(self._spending.share_spent, seen))

    @property
    def steps_left(self) -> float:
        """About how many steps of the plan in force the budget and the data have left; infinite where neither ends."""
        course, spending = self._stream, self._spending
        data = math.inf if course is None else (course.total_batches - course.position) / spending.accumulation
        return min(data, spending.steps_left(self.plan, self.step_count))

    @property
    def is_done(self) -> bool:
        """Whether the budget would not pay for another step."""
        if self.run_plan is None or self._in_step:
            return False
        is_hit = self.cache is not None and self._stream is not None and self._stream.epoch > 0
        return not self._spending.pays_for_typical(self._floor, self.step_count, is_hit=is_hit)

    @property
    def _floor(self) -> UpdatePlan:
        """The plan in force; while measuring, the cheapest that can still be decided."""
        return self._cheapest if self.is_measuring and self._cheapest is not None else self.plan

    def _pays_for(self, plan: UpdatePlan, *, beside: float = 0.0) -> bool:
        """Whether the budget pays for a step on the upcoming batch under the plan, and for `beside` FLOPs."""
        return self._spending.pays_for(plan, self.step_count, self._upcoming, self._ids, beside=beside)

    # ---------------------------------------------------------------- saving and leaving

    @contextmanager
    def holding_plan(self) -> Iterator[None]:
        """Inside, the plan stays as it is: nothing is probed or decided."""
        self._holds_plan = True
        try:
            yield
        finally:
            self._holds_plan = False

    def state_dict(self, *, cache: bool = True) -> dict[str, Any]:
        """All that a resumed run needs, beside model, optimizer and scheduler, to go on bit for bit.

        Args:
            cache: whether what the activation cache holds in memory is part of it.
        """
        return {
            "config": self.config.to_dict(),
            "step_count": self.step_count,
            "plan": self.plan.to_dict(),
            "is_measuring": self.is_measuring,
            "has_decided": self._has_decided,
            "plans": [plan.to_dict() for plan in self.plans],
            "gradient_norm_squared": self._gradient_norm_squared,
            "measurement": self._measurement.state_dict() if self._measurement else None,
            "executor": self._executor.state_dict(cache=cache),
            "average": self._average.state_dict(),
            "memory": asdict(self._memory.plan) if self._memory and self._memory.plan else None,
            "spending": self._spending.state_dict(),
            "prober": self._prober.state_dict(),
            "position": self._stream.position if self._stream else 0,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict` into a guide of the same model, config and data, before `batches` (or after `follow`)
        and after `set_optimizer`.

        Raises:
            ConfigError: the state was made with another configuration.
        """
        if state["config"] != self.config.to_dict():
            raise ConfigError("the saved state was made with another configuration; resume with the one of its run")
        self.step_count = state["step_count"]
        self.plan = UpdatePlan.from_dict(state["plan"])
        self.is_measuring = state["is_measuring"]
        self._has_decided = state["has_decided"]
        self.plans = [UpdatePlan.from_dict(plan) for plan in state["plans"]]
        self._gradient_norm_squared = state["gradient_norm_squared"]
        self._prober.load_state_dict(state["prober"])
        if self._measurement is not None:
            self._measurement.load_state_dict(state["measurement"])
        self._executor.load_state_dict(state["executor"])
        self._average.load_state_dict(state["average"])
        self._spending.load_state_dict(state["spending"])
        if state["memory"] is not None:
            self._hold(MemoryPlan.from_dict(state["memory"]), is_restored=True)
        if self._stream is None:
            self._restored = state
        else:
            self._restore_place(state)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Goes to another point of this run, a `state_dict` without cache: the next `batches` goes on from there.

        Weights, optimizer and scheduler are the caller's to put back. What the activation cache has learnt stays.
        """
        if not isinstance(self._stream, BatchStream):
            raise AttachError(
                "rewind() goes back in the guide's own batches, and there are none yet: use load_state_dict"
            )
        self._in_step, self._passes, self._step_loss, self._left_stream = False, 0, None, self._stream
        self.load_state_dict(state)
        self._restore_data(state)

    def _restore_place(self, state: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.position = state["position"]
        self._prober.restore_place(state["prober"])

    def _restore_data(self, state: Mapping[str, Any]) -> None:
        self._restore_place(state)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self._restored = None

    def detach(self) -> None:
        """Takes everything back: modules, parameter names, flags, hooks. Only the trained weights stay."""
        if self.model.__dict__.get("_rgft_guide") is not self:
            return  # detached already; another guide may hold the model now
        for handle in self._handles:
            handle.remove()
        self._executor.detach()
        if self._memory is not None:
            self._memory.leave()
        self.model.__dict__.pop("_rgft_guide", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
