"""One fine-tuning run from start to end: the loop, evaluation, records, checkpoints and resuming.

`rgft train`, the bench and the demo all run this. A `Task` brings model, data and loss; what is written goes to a run
folder, if there is one; whoever wants to watch passes observers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from rgft.batches import BatchStream, SizedDataset, on_device
from rgft.config import Config
from rgft.errors import BudgetError, ConfigError, RGFTError
from rgft.evaluation import Evaluated, Observer, evaluate
from rgft.execution.agreement import Loss
from rgft.execution.target_positions import TargetLoss
from rgft.following import StepsFollowed
from rgft.guide import Guide
from rgft.learning_rate import rate_text, scale_rates
from rgft.memory import pieces
from rgft.plan import RunPlan
from rgft.run_settings import Result, Settings, StepReport
from rgft.search import RateSearch, Search, rounds_within
from rgft.telemetry.flop_counter import flop_counter
from rgft.telemetry.run_folder import RunFolder
from rgft.workload import batch_shape

__all__ = ["Result", "Run", "Settings", "StepReport", "Task"]

log = logging.getLogger("rgft")

#: How many times as many passes over the data a cut usually buys as training everything does.
CUT_BUYS = 2.0
#: Passes whose FLOPs are counted as they run, beside being modelled.
MAX_AUDITS = 4


class Task(Evaluated, Protocol):
    """What a run needs of a task."""

    train: SizedDataset
    validation: SizedDataset | None
    loss: Callable[[nn.Module, Any], Tensor]
    loss_at_targets: TargetLoss | None


class _StoppedSearching(Exception):
    """The run was stopped in a search, whose state is none to go on from."""


class Run:
    """Fine-tunes a task's model under a configuration.

    Args:
        task: model, data, loss.
        config: RGFT's configuration.
        settings: everything else.
        folder: where records, checkpoints and the model go; None writes nothing.
        observers: called with a `StepReport` after each step. In a search of the learning rate the winner's steps are
            reported when it is over, the others' are not.
        full_flops: FLOPs of full fine-tuning, when `task.model` is not what would be fully fine-tuned (PEFT).
        optimizer: (guide, learning rate) → an optimizer of one's own, made from the guide's groups; None: the one that
            the settings name.

    Attributes:
        loss: the task's, on this run's device and in its precision.
        lr: the learning rate at multiplier 1, as far as it is settled.
        search: how it was found; None without a search, and before it.
    """

    def __init__(
        self, task: Task, config: Config, settings: Settings, *, folder: RunFolder | None = None,
        observers: Sequence[Callable[[StepReport], None]] = (), full_flops: float | None = None,
        optimizer: Callable[[Guide, float], Optimizer] | None = None,
    ) -> None:  # fmt: skip
        if settings.is_lr_searched and config.budget is not None and config.budget.memory is not None:
            raise ConfigError(
                f"lr: expected one learning rate, or 'auto', with a memory budget, found {settings.lr!r}: each "
                "candidate of a search keeps a copy of what is trained, which the budget does not count"
            )
        self.task, self.config, self.settings, self.folder = task, config, settings, folder
        self.observers = list(observers)
        self._full_flops = full_flops
        self._device = torch.device(settings.device)
        task.model.to(self._device)
        self.loss = self._placed(task.loss)
        at_targets = task.loss_at_targets
        self.guide = Guide(
            task.model, config, loss=self.loss,
            loss_at_targets=None if at_targets is None else replace(at_targets, placed=self._placed),
        )  # fmt: skip
        self.lr = self.rate_for(1.0)
        try:
            self.optimizer = (
                self.guide.make_optimizer(settings.optimizer, lr=self.lr, weight_decay=settings.weight_decay)
                if optimizer is None else optimizer(self.guide, self.lr)
            )  # fmt: skip
            self.guide.set_optimizer(self.optimizer)
        except RGFTError:
            self.guide.detach()
            raise
        self.scheduler = self.guide.scheduler(self.optimizer, shape=settings.schedule, warmup=settings.warmup)
        self.guide.accumulation = settings.accumulation
        self._followed = StepsFollowed(self.guide, is_on_cpu=self._device.type == "cpu")
        self.was_stopped = self._is_over = False
        self.search: Search | None = None
        self._is_lr_settled = not settings.is_lr_by_rule
        self._withheld: list[StepReport] | None = None  # of a candidate, while the learning rate is searched
        self._history: list[float] = []
        self._plans_written = self._probes_written = self._skips_written = 0
        self._seconds_before = 0.0
        self._batches_of_step = settings.accumulation
        self.batches_in_full = self.batches_in_epoch = 0

    def _placed(self, loss: Loss) -> Loss:
        """The loss on this run's device and in its precision."""

        def placed(model: nn.Module, batch: Any) -> Tensor:
            batch = on_device(batch, self._device)
            with self._precision():
                return loss(model, batch)

        return placed

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "bf16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def prepare(self) -> RunPlan:
        """Traces costs and fixes the run plan, once; trains nothing. `train` does it itself.

        Sets `batches_in_full` and `batches_in_epoch`: micro-batches of full fine-tuning.

        Raises:
            BudgetError: no plan fits the budget.
        """
        settings, guide = self.settings, self.guide
        if guide.run_plan is None:
            stream = BatchStream(
                self.task.train, batch_size=settings.batch_size, collate_fn=self.task.collate, epochs=settings.epochs,
                seed=self.config.seed,
            )  # fmt: skip
            self.batches_in_full, self.batches_in_epoch = stream.total_batches, stream.batches_per_epoch
            guide.prepare(stream, full_flops=self._full_flops, may_split=True)
        assert guide.run_plan is not None
        return guide.run_plan

    def train(self) -> None:
        """Runs to the end of the budget (or of the epochs). The guide stays attached until `close`.

        Dropout draws from torch's global generator, which is seeded with the configuration's seed, or restored.
        """
        guide, settings = self.guide, self.settings
        self.prepare()
        if guide.step_count == 0:
            torch.manual_seed(self.config.seed)
            self._suit_lr()
        self.task.model.train()
        started = time.perf_counter()
        is_saved = settings.is_lr_searched and self.search is None and self._search(started)
        if not (self.was_stopped or self._is_over):
            self._advance(started)
        if self._is_over and guide.step_count == 0:
            raise BudgetError(
                f"the budget is spent, or does not pay for a step of {settings.accumulation} × {settings.batch_size} "
                "examples, before the first step: nothing was trained. Give more, or make smaller steps"
            )
        self._seconds_before += time.perf_counter() - started
        if self.was_stopped and not is_saved:
            self.checkpoint()

    def rate_for(self, passes: float, *, steps: float = math.inf, trained: float = 1.0) -> float:
        """What the run begins with where it makes so many passes and steps, and trains that share of the layers."""
        return self.settings.first_lr(self.task.model, passes=passes, steps=steps, trained=trained)

    def rate_text(self, lr: float) -> str:
        """A learning rate as it is shown: that of dense weights, and of low-rank pairs where there are any."""
        return rate_text(lr, self.guide.config.update.pair_multiplier)

    def _suit_lr(self) -> None:
        """Follows the rule, first by what a cut usually buys, and for good once the cut is known."""
        guide = self.guide
        if self._is_lr_settled or (guide.is_measuring and guide.step_count > 1):
            return
        ahead = CUT_BUYS if guide.is_measuring else 1.0
        passes, steps = ahead * guide.passes, ahead * guide.steps
        lr = self.rate_for(passes, steps=steps, trained=guide.partition.share_above(guide.plan.cut))
        scale_rates(self.optimizer, self.scheduler, lr / self.lr)
        self.lr, self._is_lr_settled = lr, guide.step_count > 0 and not guide.is_measuring
        if self._is_lr_settled:
            log.info("learning rate %s, for about %.1f passes over the training data", self.rate_text(lr), passes)

    @property
    def _data(self) -> dict[str, Any]:
        """How the guide makes batches of the training set."""
        settings = self.settings
        return {
            "batch_size": settings.batch_size, "collate_fn": self.task.collate, "epochs": settings.epochs,
            "full_flops": self._full_flops,
        }  # fmt: skip

    def _advance(self, started: float, *, until: Callable[[], bool] = lambda: False) -> None:
        """Trains until a condition holds after a step, the run is over (`_is_over`), or it is stopped."""
        batches = self.guide.batches(self.task.train, **self._data)
        step_started, losses = started, []
        with self._followed:
            for batch in batches:
                if not losses:
                    step_started, self._batches_of_step = time.perf_counter(), self.guide.batches_of_step
                    self._followed.begin_step()
                losses.append(self._passes(batch))
                if len(losses) == self._batches_of_step:
                    self._step(losses, step_started, started)
                    losses = []
                    if self.was_stopped or until():
                        return
        self._is_over = True

    def _search(self, started: float) -> bool:
        """Trains until the plan is decided, then finds the learning rate.

        Returns:
            Whether it was stopped while searching: then the checkpoint made before the search is where to go on.
        """
        guide = self.guide

        def is_decided() -> bool:
            return guide.step_count > 0 and not guide.is_measuring and guide.progress >= self.settings.warmup

        if guide.step_count > 0:  # resumed: its place in the data is part of its progress
            guide.open(self.task.train, **self._data)
        if not is_decided():
            self._advance(started, until=is_decided)
            if self.was_stopped or self._is_over:
                return False
            guide.rewind(guide.state_dict(cache=False, weights=False))  # to where it is: the batches begin anew here
        wanted = self.settings.candidate_lrs(self.lr)
        rates, lengths = rounds_within(wanted, guide.steps_left)
        if len(rates) < len(wanted):
            log.warning(
                "about %d steps are left, too few to search among %d learning rates: trying %s", guide.steps_left,
                len(wanted), ", ".join(f"{rate:g}" for rate in rates),
            )  # fmt: skip
        return bool(lengths) and self._find_rate(rates, lengths, started)

    def _find_rate(self, rates: Sequence[float], lengths: Sequence[int], started: float) -> bool:
        guide, reports = self.guide, dict[float, list[StepReport]]()
        if self.folder is not None:
            self.checkpoint(seconds=self._seconds_before + time.perf_counter() - started)

        def train(rate: float, steps: int) -> list[float]:
            self._withheld, self._is_over, end = [], False, guide.step_count + steps
            self._advance(started, until=lambda: guide.step_count >= end)
            if self.was_stopped:
                raise _StoppedSearching
            reports.setdefault(rate, []).extend(self._withheld)
            return [report.loss for report in self._withheld]

        try:
            self.search = RateSearch(guide, self.scheduler, train).run(rates, reference=self.lr, lengths=lengths)
        except _StoppedSearching:
            log.info("stopped while searching the learning rate; a resumed run searches anew")
            return True
        finally:
            self._withheld = None
        self._is_over = False  # some candidate may have come to the end of the data
        self.lr = self.search.rate
        log.info("learning rate %s, of %s", self.rate_text(self.lr), ", ".join(f"{rate:g}" for rate in rates))
        for report in reports[self.search.rate]:
            self._publish(report)
        if self.folder is not None:
            self.folder.records.append("search", {"step": guide.step_count, **self.search.to_dict()})
        return False

    def _passes(self, batch: Any) -> Tensor:
        """Forward and backward of a micro-batch, in pieces where memory is limited; its share of the step's loss."""
        ids, rows, whole = self.guide.announced_ids, self._rows_per_pass, self.task.weight(batch)
        if rows is None or len(batch["labels"]) <= rows:
            return self._pass(batch)
        losses: list[Tensor] = []
        for chosen, piece in pieces(batch, rows):
            self.guide.begin_piece(None if ids is None else ids[chosen.start : chosen.stop])
            # The mean over what the task counts (examples, target tokens), as of the whole batch.
            losses.append(self._pass(piece, share=self.task.weight(piece) / max(1, whole)))
        return torch.stack(losses).sum()

    @property
    def _rows_per_pass(self) -> int | None:
        """How many rows memory holds at once; None: it is not limited."""
        plan = self.guide.run_plan
        return None if plan is None or plan.memory is None else plan.memory.rows_per_pass

    def _pass(self, batch: Any, *, share: float = 1.0) -> Tensor:
        """Forward and backward; returns the detached share of the step's loss."""
        ledger = self.guide.ledger
        before = ledger.spent_flops
        counter = flop_counter() if self._is_audited else contextlib.nullcontext()
        with counter:
            loss = self.guide.loss(batch) * share / self._batches_of_step
            loss.backward()
        if isinstance(counter, FlopCounterMode):
            ledger.add_audit(counted=float(counter.get_total_flops()), modelled=ledger.spent_flops - before)
        return loss.detach()

    @property
    def _is_audited(self) -> bool:
        """Counting makes a pass slower: the first pass, and one under each of the first new plans.

        It also holds on to what checkpointing would free, and so is left out where memory asked for that.
        """
        guide = self.guide
        memory = guide.run_plan.memory if guide.run_plan is not None else None
        if guide.ledger.audits >= MAX_AUDITS or (memory is not None and memory.checkpointing):
            return False
        is_under_new_plan = bool(guide.plans) and guide.plans[-1].step == guide.step_count - 1
        return guide.ledger.audits == 0 or is_under_new_plan

    def stop(self) -> None:
        """Ends training after the step in hand, with a checkpoint to resume from. A signal handler may call it."""
        self.was_stopped = True

    def _step(self, losses: list[Tensor], step_started: float, started: float) -> None:
        self.guide.step(self.optimizer, self.scheduler, max_grad_norm=self.settings.max_grad_norm)
        self._suit_lr()
        self._followed.end_step()
        self.optimizer.zero_grad()
        now = time.perf_counter()
        seconds = self._seconds_before + now - started
        report = self._report(float(torch.stack(losses).sum()), seconds, now - step_started)
        if self._withheld is not None:
            self._withheld.append(report)
            return
        self._publish(report)
        every = self.settings.checkpoint_every
        if every and self.guide.step_count % every == 0:
            self.checkpoint(seconds=seconds)

    def _report(self, loss: float, seconds: float, step_seconds: float) -> StepReport:
        guide = self.guide
        return StepReport(
            step=guide.step_count, loss=loss, progress=guide.progress, seconds=seconds, step_seconds=step_seconds,
            flops_fraction=guide.flops_fraction, active=len(guide.active), components=len(guide.partition),
            cut=guide.plan.cut, captured=guide.error_map.captured(guide.active), top=guide.error_map.top(3),
        )  # fmt: skip

    def _publish(self, report: StepReport) -> None:
        self._history.append(report.step_seconds)
        if self.folder is not None:
            self.folder.records.append("step", asdict(report))
            self._record_decisions(self.folder)
        for observer in self.observers:
            observer(report)

    def _record_decisions(self, folder: RunFolder) -> None:
        """Probes and plans, under the number of the step that they came before (the first step is 1)."""
        guide = self.guide
        for step, values in guide.map_history[self._probes_written :]:
            folder.records.append("probe", {"step": step + 1, "values": values})
        for plan in guide.plans[self._plans_written :]:
            folder.plans.append("plan", {**plan.to_dict(), "step": plan.step + 1})
        for entry in guide.skipping_history[self._skips_written :]:
            folder.records.append("skipping", {"step": guide.step_count, **entry})
        self._probes_written, self._plans_written = len(guide.map_history), len(guide.plans)
        self._skips_written = len(guide.skipping_history)

    def checkpoint(self, *, seconds: float | None = None) -> None:
        """Saves all that `resume` needs, replacing the previous checkpoint only when complete.

        Args:
            seconds: that the run took so far; None: as after `train`.
        """
        if self.folder is not None:
            self.folder.save_checkpoint(
                {
                    "model": self.task.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "guide": self.guide.state_dict(),
                    "seconds": self._seconds_before if seconds is None else seconds,
                    "lr": self.lr,
                    "is_lr_settled": self._is_lr_settled,
                    "search": None if self.search is None else self.search.to_dict(),
                }
            )

    def resume(self) -> int:
        """Restores the folder's checkpoint; returns its step. The run goes on bit for bit."""
        assert self.folder is not None
        state = self.folder.load_checkpoint()
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.guide.load_state_dict(state["guide"])
        self._seconds_before = state["seconds"]
        self.lr, self._is_lr_settled = state["lr"], state["is_lr_settled"]
        self.search = None if state["search"] is None else Search.from_dict(state["search"])
        self._probes_written, self._plans_written = len(self.guide.map_history), len(self.guide.plans)
        self._skips_written = len(self.guide.skipping_history)
        # What was recorded after the checkpoint happens again.
        self.folder.records.rewind(self.guide.step_count)
        self.folder.plans.rewind(self.guide.step_count)
        return self.guide.step_count

    def evaluate(self, dataset: SizedDataset, observer: Observer | None = None) -> dict[str, float]:
        """Mean loss and the task's metrics (see `rgft.evaluation`). Not part of the budget; the ledger has it beside.

        Between two steps it changes nothing of the run, which goes on bit for bit.
        """
        started, flops, costs = time.perf_counter(), 0.0, self.guide.costs

        def loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal flops
            flops += 0.0 if costs is None else costs.forward_flops(*batch_shape(batch))
            return self.loss(model, batch)

        # What a step holds is enough for a forward pass over as many rows.
        largest = min(self.settings.eval_batch_size, self._rows_per_pass or self.settings.eval_batch_size)
        with self.guide.evaluating():
            metrics = evaluate(self.task, dataset, batch_size=largest, loss=loss, observer=observer)
        self.guide.ledger.add_evaluation(seconds=time.perf_counter() - started, flops=flops)
        return metrics

    def result(self, metrics: Mapping[str, Mapping[str, float]]) -> Result:
        return Result(
            steps=self.guide.step_count, metrics={split: dict(values) for split, values in metrics.items()},
            ledger=self.guide.summary(), step_seconds=self._history,
        )  # fmt: skip

    def close(self) -> None:
        """Detaches the guide: the model is plain again, with trained weights."""
        self.guide.detach()
