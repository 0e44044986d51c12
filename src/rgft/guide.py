"""The guide: measure → decide → act, around a training loop that stays the user's own.

guide = rgft.Guide(model, rgft.Config(budget=0.3))
optimizer = torch.optim.AdamW(guide.param_groups(lr=2e-4))
scheduler = guide.scheduler(optimizer)
model.train()
for batch in guide.batches(dataset, batch_size=32, collate_fn=collator, epochs=3):
    guide.loss(batch).backward()
    guide.step(optimizer, scheduler)
    optimizer.zero_grad()
guide.detach()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rgft.batches import BatchStream, IndexedBatch, SizedDataset
from rgft.config import Config
from rgft.costing import machine_pace, traced_costs
from rgft.errors import AttachError, ConfigError
from rgft.execution.length_groups import LengthGroups
from rgft.execution.optimizers import counts_in_groups
from rgft.execution.param_groups import By, param_groups, warn_of_shared_rates
from rgft.execution.target_positions import TargetLoss
from rgft.guided_run import GuidedRun
from rgft.optimizer import kind_named, occasional_flops
from rgft.plan import MemoryPlan, RunPlan
from rgft.probe_schedule import ProbePool
from rgft.progress import Course
from rgft.pruning import KeptRows
from rgft.schedule import check_scheduler, learning_rate_schedule
from rgft.telemetry.energy import EnergyMeter
from rgft.training_loss import Loss
from rgft.workload import Workload

log = logging.getLogger("rgft")

#: Batches among which one with padding is looked for.
BATCHES_LOOKED_AT = 8


class Guide(GuidedRun):
    """Fine-tunes a model where it errs, within a budget.

    Beside its methods it shows `plan` (in force), `plans` (all that acted differently, in order), `error_map`,
    `map_history` (step and values at each probe), `readout`, `run_plan`, `ledger` and `partition`.

    Args:
        model: changed in place while attached; `detach` (or leaving the context) leaves no trace but trained weights.
        config: a `Config`; None is the preset `rgft`.
        loss: (model, batch) → per-example losses [B] or a scalar; None takes `model(**batch).loss`.
        loss_at_targets: the same loss in a form that computes the model's head at targets alone; training steps use it
            under `execution.positions: auto`, where that changes neither loss nor gradients.

    Raises:
        AttachError: the model has a guide already, or nothing to train.
        ConfigError: `config` is something else.
        PartitionError: the model cannot be split into components.
    """

    def __init__(
        self, model: nn.Module, config: Config | None = None, *, loss: Loss | None = None,
        loss_at_targets: TargetLoss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, config, loss=loss, loss_at_targets=loss_at_targets)
        self._left_stream: BatchStream | None = None  # what the next `batches` goes on with
        self._restored: Mapping[str, Any] | None = None  # a place in the data, until there is data
        self._ends_after_step = self._is_gone_through = False

    # ---------------------------------------------------------------- setting up

    def param_groups(
        self, lr: float, *, weight_decay: float = 0.0, classifier_lr: float | None = None,
        decays: Collection[str] | None = None, by: By = "rate",
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Parameter groups for an optimizer: all components, whether on now or not, in either form.

        Args:
            lr: learning rate at multiplier 1; of low-rank pairs times `update.low_rank.lr_multiplier`.
            weight_decay: for weights; biases and norms (one-dimensional parameters) have none.
            classifier_lr: for classifier components; None is `lr` × `config.classifier_lr_multiplier`.
            decays: names of the parameters that decay, as the model shows them now; None: as under `weight_decay`.
            by: "matrix": hidden layers' matrices also stand apart (`MuonAdamW`); "component": each component also has
                groups of its own (optimizers that count steps in groups).
        """
        head_rate = lr * self.config.classifier_lr_multiplier if classifier_lr is None else classifier_lr
        return param_groups(
            self.model, self._binding, lr=lr, classifier_lr=head_rate, weight_decay=weight_decay, decays=decays, by=by,
            pair_lr_multiplier=self.config.update.pair_multiplier or 1.0,
        )  # fmt: skip

    def make_optimizer(
        self, name: str = "adamw", *, lr: float, weight_decay: float = 0.0, classifier_lr: float | None = None
    ) -> Optimizer:
        """An optimizer that is known by name, of all components, attached.

        Args:
            name: of `rgft.optimizer.KINDS`: adamw, sgd, adafactor, lion, muon, schedule-free, adamw-8bit.
            lr, weight_decay, classifier_lr: see `param_groups`.

        Raises:
            OptimizerError: it cannot work on this granularity, or its package is not installed.
        """
        kind = kind_named(name)
        groups = self.param_groups(lr, weight_decay=weight_decay, classifier_lr=classifier_lr, by=kind.groups)
        optimizer = kind.build(groups, lr)
        self.set_optimizer(optimizer)
        return optimizer

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
        if self.config.update.average_last and counts_in_groups(optimizer):
            raise ConfigError(
                f"update.average_last: expected 0 with {type(optimizer).__name__}, which averages its iterates itself; "
                f"found {self.config.update.average_last:g}"
            )
        self._executor.set_optimizer(optimizer)
        warn_of_shared_rates(optimizer, self._binding, pair_lr_multiplier=self.config.update.pair_multiplier or 1.0)
        self._spending.optimizer_flops = self._executor.optimizer_flops()
        self._spending.occasional_flops = occasional_flops(optimizer)
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
        example, memory, spending = stream.load(next(stream.indices())), self._memory, self._spending
        if self.step_count == 0:
            spending.reckon_with_dropout(not self._may_leave_out_dropout)
        costs = traced_costs(
            self.model, self._binding, self._executor, self._loss,
            example if memory is None else memory.traceable(example), of=cost_loss or self._loss.mean,
            proves=self.config.execution.positions != "all" and own_loss and cost_loss is None,
            dropout=self._dropout if self._may_leave_out_dropout else None,
            sampled=self.config.update.sample, seed=self.config.seed,
        )  # fmt: skip
        if self._weighted is not None:
            self._weighted.check()
        spending.groups = self._find_groups(stream) if own_loss else None
        workload = Workload.scan(
            stream, self._loss.count, computed=lambda batch: spending.groups and spending.groups.positions(batch)
        )  # fmt: skip
        costs, spending.count = replace(costs, target_share=workload.target_share), self._loss.count
        if memory is not None:
            optimizer = self._executor.optimizer
            self._hold(
                memory.choose(stream, workload, example, self._loss.mean, optimizer=optimizer, may_split=may_split)
            )
            costs = memory.costs(costs)
            if memory.plan is not None and memory.plan.rows_per_pass < memory.plan.rows:
                # Pieces that memory holds are cut from batches as they are.
                spending.groups, workload = None, replace(workload, computed_share=1.0)
        costs = self._executor.with_pairs(costs)
        pace = machine_pace(self.model) if spending.needs_pace else None
        if spending.meter is None:
            energy = self.config.energy
            spending.meter = EnergyMeter.of(
                next(self.model.parameters()).device, watts=energy.watts, measures=energy.counter == "auto"
            )
            self.ledger.carbon_intensity = energy.carbon_intensity
        spending.allow(costs, workload, full=full_flops, pace=pace)
        steps = spending.full_steps(stream.total_batches)
        first_step = spending.require(self._decisions.plan_cheapest(steps), workload)
        self._read_out(stream, spare=spending.allowed - first_step, own_loss=own_loss)
        if self._measurement is not None and self._decisions.follows_map:
            self._prober.plan(steps=steps, measuring=self.config.warmup_fraction, examples=len(stream.dataset))
            if memory is not None and memory.plan is not None:
                self._prober.limit(memory.plan.probe_size)
            self._decisions.skip_idle_measuring(stream.total_batches, epoch=stream.batches_per_epoch)
        self._progress.run_plan = run_plan = RunPlan(
            steps=steps, cache="none" if self._executor.cache is None else self._executor.cache.place,
            probes=self._prober.number(steps), probe_size=self._prober.schedule.size, flops=spending.allowed,
            full_flops=spending.full, reason=self.plan.reason,
            position=None if self._executor.positions is None else self._executor.positions.position,
            computed_share=workload.computed_share,
            head_at_targets=self._loss.at_targets is not None, memory=None if memory is None else memory.plan,
            skips="" if self._weighted is None else self._weighted.says,
        )  # fmt: skip
        return run_plan

    def _read_out(self, stream: BatchStream, *, spare: float, own_loss: bool) -> None:
        """Reads layers out for the first decision, where the policy looks at that, for at most `spare` FLOPs."""
        decisions, memory = self._decisions, self._memory
        if not decisions.wants_readout or self.ledger.readout_flops:
            return
        if not own_loss:
            log.info("readout: the loss of this loop is not the guide's: decided by costs")
            return
        decisions.readout = self._reader.read(
            stream, flops=min(decisions.readout_share * self._spending.allowed, spare),
            rows=stream.batch_size if memory is None or memory.plan is None else memory.plan.rows_per_pass,
        )  # fmt: skip

    def _find_groups(self, stream: BatchStream) -> LengthGroups | None:
        """How batches of the run are taken apart by length; None: they are not."""
        if self.config.execution.padding == "all":
            return None
        first = (stream.load(indices) for indices in islice(stream.indices(), BATCHES_LOOKED_AT))
        with self._binding.plain():
            return LengthGroups.find(self.model, first, self._loss.mean, self._loss.count_rows)

    def _hold(self, plan: MemoryPlan, *, is_restored: bool = False) -> None:
        """Keeps to a memory budget from here on."""
        assert self._memory is not None
        self._memory.put_into_force(plan, is_restored=is_restored)
        self._decisions.keep_to_memory()
        self.ledger.limit_memory(limit=plan.limit, forecast=plan.needed)
        if self.run_plan is not None:
            self._progress.run_plan = replace(self.run_plan, memory=plan)
        if self._spending.costs is not None:
            self._spending.costs = self._memory.costs(self._spending.costs)

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

        Raises:
            AttachError: this run was gone through already.
        """
        if self._left_stream is None:
            if self._is_gone_through:
                raise AttachError(
                    "batches(): the run was gone through to its end already, and a guide has one run; ask for all its "
                    "epochs at once (`epochs=3`), or make a new guide for another run"
                )
            self.open(
                dataset, batch_size=batch_size, collate_fn=collate_fn, epochs=epochs, workers=workers,
                full_flops=full_flops,
            )  # fmt: skip
        stream, self._left_stream = self._left_stream, None
        assert stream is not None
        for indexed in self._awaited(stream):
            self.announce(indexed.batch, indexed.ids, kept=indexed.kept)
            self._progress.following = indexed.following
            if not self.affords_upcoming:
                break
            yield indexed.batch
        self._is_gone_through = True
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
        train = self._prober.set_aside(everything)
        self._progress.course = self._left_stream = stream = everything.of(train)
        if self._weighted is not None and self._weighted.examples is not None:
            if stream.batch_size == 1:
                raise ConfigError(
                    "examples.prune: expected batches of 2 or more examples, found batch_size 1: at least one row of a "
                    "batch is kept, so that nothing would be skipped. Use larger batches and less accumulation"
                )
            self._weighted.check_rows(self.model, everything.load(next(everything.indices())))
            stream.prune(self._weighted.examples)
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
        """Mean loss of the batch, under the plan of this step.

        Raises:
            AttachError: the model is in evaluation mode.
        """
        if not self.model.training:
            raise AttachError(
                "loss(): expected the model in training mode, found it in evaluation mode, as from_pretrained leaves "
                "it; call model.train() before the loop, and after evaluating"
            )
        if not self._step.is_open:
            self.begin_step()
        return self._step.loss(batch)

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
        check_scheduler(scheduler)
        if not self._step.is_open:
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

    def follow(self, course: Course, *, pool: ProbePool | None = None, prunes: bool = False) -> None:
        """For trainers that own the batches: says where the run is in them, and what may be probed.

        Call it after `prepare` and before the first step; advance `course.position` with each micro-batch.

        Args:
            course: position and length of the run.
            pool: examples that the trainer never trains on; None: scores come from training batches alone.
            prunes: whether the trainer skips what `examples.prune` says, and announces what is kept.

        Raises:
            ConfigError: examples or tokens are to be skipped, and the trainer does not do it.
        """
        settings = self.config.examples
        if (settings.prune > 0.0 and not prunes) or settings.tokens > 0.0:
            raise ConfigError(
                "examples.prune, examples.tokens: expected the guide's own batches (guide.batches, `rgft train`), "
                "found a trainer's, which do not skip; set them to 0. (rgft.integrations.enable skips "
                "examples, not tokens)"
            )
        self._progress.course, self._prober.pool = course, pool

    def announce(self, batch: Any, ids: Sequence[int] | None = None, *, kept: KeptRows | None = None) -> None:
        """Says what the next training batch is, before a step and before each pass (`batches` does it itself).

        Args:
            batch: the batch; before a step of several, the largest.
            ids: which examples its rows are; None: unknown.
            kept: what was left of a batch of which some examples may be skipped; None: none may.
        """
        self._progress.upcoming, self._progress.ids, self._progress.kept = batch, ids, kept

    def begin_piece(self, ids: Sequence[int] | None) -> None:
        """Before a pass over some rows of the batch in hand: says which examples they are."""
        if not self._step.is_open:
            self.begin_step()  # which looks at what the whole batch costs
        self._progress.ids = ids

    def begin_step(self) -> None:
        """Probes when due, decides, and puts the plan in force. Uses nothing of the batch that follows."""
        self._decisions.before_step()
        self._dropout.turn(off=self._drops_nothing)
        self._spending.reckon_with_dropout(not self._dropout.is_off)
        if self._memory is not None:
            self._memory.bound_cache(self.cache, self.plan.cut)
        self._step.begin(self.plan)

    @property
    def _may_leave_out_dropout(self) -> bool:
        """Whether a step may be made without dropout."""
        setting = self.config.update.dropout
        return len(self._dropout) > 0 and (setting == "off" or (setting == "auto" and self._dropout.may_change))

    @property
    def _drops_nothing(self) -> bool:
        """Whether the step in hand is made without dropout."""
        if not self._may_leave_out_dropout:
            return False
        # The floor: what is decided after measuring is cheaper than everything, and lasts longer.
        return self.config.update.dropout == "off" or self._progress.sees_none_again(self._decisions.floor)

    def before_optimizer_step(self) -> None:
        """Checks and scores the gradients of this step's batches."""
        norms = self._step.checked_gradients()
        if self._decisions.wants_norm and len(self.active) == len(self.partition):
            self._decisions.observe_norms(norms.squared)
        if self._measurement is not None and self._decisions.scores_training:
            with self._step.scoring():
                self._measurement.observe_training(self.step_count)
        if self._measurement is not None and (self._decisions.scores_training or self._decisions.scores_next):
            self._measurement.expect_step()
            self._spending.book_dry_step(self.active)

    def end_step(self) -> None:
        """After the optimizer's step, before gradients are cleared."""
        self._executor.skip_positions(False)
        self._executor.use_all_rows()
        self._dropout.turn(off=False)
        if self._measurement is not None:
            self._step.book_scoring(self._measurement.take_seconds())
            if self._decisions.scores_training:
                with self._step.scoring():
                    self._measurement.observe_own_step(self.step_count)
        self._step.end()
        if self._ends_after_step:
            self.finish()

    def finish(self) -> None:
        """Ends the run: weights become the mean of the last iterates (`update.average_last`, or a schedule-free
        optimizer's own). Called once or more.

        `batches` calls it when the budget is spent or the data is over; not when the loop is left early.
        """
        self._ends_after_step = self._step.is_open  # the data ended inside an accumulation, whose step is still to come
        if not self._step.is_open:
            self._average.apply()
            if self._executor.mean is not None:
                self._executor.mean.keep()

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that it would end with: those of a schedule-free optimizer are means.

        Afterwards it has what is trained, bit for bit.
        """
        return nullcontext() if self._executor.mean is None else self._executor.mean.shown()

    # ---------------------------------------------------------------- saving

    def holding_plan(self) -> AbstractContextManager[None]:
        """Inside, the plan stays as it is: nothing is probed or decided."""
        return self._decisions.held()

    def state_dict(self, *, cache: bool = True, weights: bool = True) -> dict[str, Any]:
        """All that a resumed run needs, beside model, optimizer and scheduler, to go on bit for bit.

        Args:
            cache: whether what the activation cache holds in memory is part of it.
            weights: whether low-rank pairs are, and the weights beside them (a model's own state has them merged).
        """
        return {
            "config": self.config.to_dict(),
            "step_count": self.step_count,
            **self._decisions.state_dict(),
            "measurement": self._measurement.state_dict() if self._measurement else None,
            "executor": self._executor.state_dict(cache=cache, weights=weights),
            "average": self._average.state_dict(),
            "weighted": None if self._weighted is None else self._weighted.state_dict(),
            "memory": asdict(self._memory.plan) if self._memory and self._memory.plan else None,
            "spending": self._spending.state_dict(),
            "prober": self._prober.state_dict(),
            "position": self._progress.course.position if self._progress.course else 0,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict` into a guide of the same model, config and data, before `batches` (or after `follow`)
        and after `set_optimizer`.

        Raises:
            ConfigError: the state was made with another configuration.
        """
        self._load(state, weights=True)

    def _load(self, state: Mapping[str, Any], *, weights: bool) -> None:
        if state["config"] != self.config.to_dict():
            raise ConfigError("the saved state was made with another configuration; resume with the one of its run")
        self._is_gone_through = False
        self._progress.step = state["step_count"]
        self._decisions.load_state_dict(state)
        self._prober.load_state_dict(state["prober"])
        if self._measurement is not None:
            self._measurement.load_state_dict(state["measurement"])
        self._executor.load_state_dict(state["executor"], weights=weights)
        self._step.count_pairs()
        self._average.load_state_dict(state["average"])
        self._spending.load_state_dict(state["spending"])
        if self._weighted is not None:
            self._weighted.load_state_dict(state["weighted"])
        if state["memory"] is not None:
            self._hold(MemoryPlan.from_dict(state["memory"]), is_restored=True)
        if self._progress.course is None:
            self._restored = state
        else:
            self._restore_place(state)

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Goes to another point of this run, a `state_dict` without cache and weights: `batches` goes on from there.

        Weights (low-rank pairs among them), optimizer and scheduler are the caller's to put back. What the activation
        cache has learnt stays.
        """
        stream = self._progress.course
        if not isinstance(stream, BatchStream):
            raise AttachError(
                "rewind() goes back in the guide's own batches, and there are none yet: use load_state_dict"
            )
        self._step.drop()
        self._ends_after_step = False
        self._left_stream = stream
        self._load(state, weights=False)
        self._restore_data(state)

    def _restore_place(self, state: Mapping[str, Any]) -> None:
        assert self._progress.course is not None
        self._progress.course.position = state["position"]
        self._prober.restore_place(state["prober"])

    def _restore_data(self, state: Mapping[str, Any]) -> None:
        self._restore_place(state)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self._restored = None
