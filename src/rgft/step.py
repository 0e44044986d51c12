"""The step in hand: its passes through the model, whether its gradients may be used, and what is booked for it."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.errors import AttachError, NonFiniteError
from rgft.execution.averaging import IterateAverage
from rgft.execution.eager import eager
from rgft.execution.executor import Executor
from rgft.execution.gradient_norms import StepNorms
from rgft.execution.length_groups import PartOfBatch
from rgft.plan import UpdatePlan
from rgft.progress import Progress
from rgft.spending import NOTHING_SKIPPED, Spending
from rgft.training_loss import TrainingLoss
from rgft.weighted_loss import WeightedLoss
from rgft.workload import batch_shape

#: Kinds of components that every batch reaches (unlike experts).
ALWAYS_REACHED = frozenset({"layer", "attention", "ffn", "head", "ffn_block", "channel_block"})


class Step:
    """One optimizer step after the other, each under its plan. Hooks the model until `leave`.

    Args:
        model, partition: what is trained.
        executor, average, loss, progress, spending: of the run.
        average_last: share of the run, at its end, whose weights are averaged.
        weighted: the loss where examples or targets are skipped; None: none are.

    Attributes:
        is_open: whether a step is begun and not ended.
        batches: micro-batches of it so far.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, executor: Executor, average: IterateAverage, loss: TrainingLoss,
        progress: Progress, spending: Spending, *, average_last: float, weighted: WeightedLoss | None = None,
    ) -> None:  # fmt: skip
        self._model, self._partition = model, partition
        self._executor, self._average, self._training_loss = executor, average, loss
        self._progress, self._spending, self._average_last = progress, spending, average_last
        self._weighted = weighted
        self.is_open, self.batches = False, 0
        self._cut = 0
        self._passes = 0  # through the model
        self._loss: Tensor | None = None
        self._started = 0.0
        self._reached: dict[int, list[str]] = {}  # depth → components there that every batch reaches
        for component in partition:
            if component.kind in ALWAYS_REACHED:
                self._reached.setdefault(component.depth, []).append(component.name)
        self._updated: tuple[frozenset[str], dict[str, int]] = (frozenset(), {})  # parts, and components' sizes
        self._handles = [
            model.register_forward_pre_hook(eager(self._before_forward), with_kwargs=True),
            model.register_forward_hook(eager(self._after_forward), always_call=True),
        ]

    def begin(self, plan: UpdatePlan) -> None:
        """Puts the plan in force."""
        self._cut = plan.cut
        self._average.before_merge(self._executor.to_merge(plan, self._progress.step))
        self._executor.apply(plan, self._progress.step)
        self.count_pairs()
        self._average.before_step(self._executor.parts)
        self.is_open, self.batches, self._passes = True, 0, 0
        self._started = time.perf_counter()

    def count_pairs(self) -> None:
        """Tells the costs which low-rank pairs the model has now."""
        if self._spending.costs is not None:
            self._spending.costs = self._executor.with_pairs(self._spending.costs)

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch of the step."""
        self.batches += 1
        parts = self._parts(batch)
        loss = self._of_pass(batch) if parts is None else self._in_parts(batch, parts)
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        return loss

    def _of_pass(self, batch: Any) -> Tensor:
        return (self._weighted or self._training_loss).of_step(self._model, batch)

    def _parts(self, batch: Any) -> list[PartOfBatch] | None:
        """The batch in groups of rows of like length; None where it passes whole."""
        groups, ids = self._spending.groups, self._progress.ids
        if groups is None or not (self._model.training and torch.is_grad_enabled()):
            return None
        parts = groups.parts(batch, announced=self._progress.upcoming)
        is_known = ids is None or parts is None or sum(len(part.rows) for part in parts) == len(ids)
        return parts if is_known else None

    def _in_parts(self, batch: Any, parts: Sequence[PartOfBatch]) -> Tensor:
        """The batch's loss, as the sum of its parts' shares."""
        ids, losses = self._progress.ids, list[Tensor]()
        self._spending.book_padding(batch, parts)
        try:
            for part in parts:
                self._progress.ids = part.ids_of(ids)
                losses.append(part.share * self._of_pass(part.batch))
        finally:
            self._progress.ids = ids
        return torch.stack(losses).sum()

    def checked_gradients(self) -> StepNorms:
        """‖∇L‖ of what has a gradient, all of it finite.

        Raises:
            AttachError: no pass went through the model, or gradients do not reach what they should.
            NonFiniteError: the loss or a gradient is NaN or infinite.
        """
        step = self._progress.step
        if not self._passes:
            raise AttachError(
                f"step {step}: no training pass went through the guided model, so that its cost is unknown. "
                "Call the model itself, not a submodule of it, and in training mode (model.train())"
            )
        norms = self._executor.gradient_norms()
        if norms is None:
            raise AttachError(f"step {step}: no active component has a gradient; call backward() on guide.loss(batch)")
        if not norms.are_finite:
            squared_by_name = norms.squared.items()
            culprit = next((name for name, squared in squared_by_name if not math.isfinite(squared)), "all together")
            loss = "unknown" if self._loss is None else f"{float(self._loss):.6g}"
            raise NonFiniteError(
                f"step {step}: the gradient of {culprit!r} is not finite (loss {loss}); nothing was "
                "updated. Lower the learning rate, or check this step's examples"
            )
        if self._cut > 0:
            self._check_lowest_layer(norms.names)
        return norms

    def _check_lowest_layer(self, names: Collection[str]) -> None:
        """What just trains above the cut has a gradient: that is where backward has to come to."""
        active = self._executor.active
        lowest = [name for name in self._reached.get(self._cut, ()) if name in active]
        if lowest and not any(name in names for name in lowest):
            raise AttachError(
                f"step {self._progress.step}: the lowest layer that trains got no gradient "
                f"({', '.join(sorted(lowest))}). "
                "Reentrant checkpointing gives none above a cut: use use_reentrant=False"
            )

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Time spent inside is booked as scoring, and is no time of the step that it happens in."""
        started = time.perf_counter()
        yield
        self.book_scoring(time.perf_counter() - started)

    def book_scoring(self, seconds: float) -> None:
        """Books time as scoring that passed in the step, and is no time of it."""
        self._spending.ledger.add_scoring(seconds=seconds)
        self._started += seconds

    def end(self) -> None:
        """After the optimizer's step."""
        parts = self._executor.parts
        if parts is not self._updated[0]:
            is_same = parts == self._updated[0]
            self._updated = parts, self._updated[1] if is_same else self._executor.trained_sizes
        self._spending.end_step(
            step=self._progress.step, seconds=time.perf_counter() - self._started, updated=self._updated[1]
        )
        # Progress counts this step: the last of all is averaged, too.
        if self._average.count or self._progress.share > 1.0 - self._average_last:
            self._average.after_step(parts)
        self._progress.step += 1
        self.is_open, self._loss = False, None

    def drop(self) -> None:
        """Forgets a step that was begun."""
        self.is_open, self._passes, self._loss = False, 0, None

    # ---------------------------------------------------------------- around the model's forward

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._model:  # a deep copy, which has the hooks but no guide
            return
        if not (self.is_open and module.training and torch.is_grad_enabled()):
            self._executor.skip_positions(False)
            self._executor.use_all_rows()
            return
        self._passes += 1
        self._executor.sample_rows(self._progress.step, self._passes)
        ids, cut = self._progress.ids, self._cut
        rows, tokens = batch_shape(kwargs or args)
        started = time.perf_counter()
        filled = self._executor.fill_cache(args, kwargs, ids, tokens)
        if filled:
            self._spending.book_fill(filled, tokens, below=cut, seconds=time.perf_counter() - started)
        self._executor.skip_positions(cut <= len(self._partition.layers))
        cached_below = self._executor.begin_forward(ids, kwargs.get("attention_mask"), tokens)
        self._executor.read_ahead(self._progress.take_following(), tokens)
        self._spending.book_pass(
            self._executor.active, rows=rows, tokens=tokens, cached_below=cached_below,
            targets=self._training_loss.targets, dx_into=cut if self._executor.proves_padding else 0,
            skipped=NOTHING_SKIPPED if self._weighted is None else self._weighted.take_skipped(),
        )  # fmt: skip

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._model:
            self._executor.end_forward()

    def leave(self) -> None:
        """Takes the hooks from the model."""
        for handle in self._handles:
            handle.remove()
