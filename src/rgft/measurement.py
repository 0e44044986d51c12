"""Measuring: runs signals on probes and on training gradients, and keeps the error maps.

Two maps are kept side by side: the signal's own, and (for signals of an optimizer step) the decrease on the very batch
that made the step. Their ratio tells what a component learns from what it memorises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.components import Component
from rgft.error_map import ErrorMap
from rgft.errors import NonFiniteError
from rgft.execution.binding import Binding
from rgft.execution.directions import Directions
from rgft.execution.probing import still
from rgft.signals.base import GradientSignal, PartGradient, Parts, Probe, Signal, at_least_float32
from rgft.signals.decrease import PredictedDecrease
from rgft.step_scores import StepScores

Loss = Callable[[nn.Module, Any], Tensor]


class Measurement:
    """Owns the error maps of a run and fills them.

    Args:
        model, binding: what is measured.
        signal: the score.
        loss: mean loss of a batch, a scalar.
        beta, bias_correction: of the maps.
        row_stride: signals of a step read one row in so many of each large weight, others the next time.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, signal: Signal, loss: Loss, *, beta: float, bias_correction: bool,
        row_stride: int = 1,
    ) -> None:  # fmt: skip
        self._model, self._binding, self._loss = model, binding, loss
        self.signal = signal
        empty = ErrorMap.empty(binding.partition.names, beta=beta, bias_correction=bias_correction)
        self.error_map, self.same_batch_map = empty, empty
        self._same_batch = PredictedDecrease()
        # A signal of the step on the very batch that made it has no map beside its own.
        self._is_same_batch = isinstance(signal, PredictedDecrease)
        self._steps: StepScores | None = None
        self._row_stride = row_stride
        # Looks so far, of each kind by itself: which rows the next one reads.
        self._training_looks = self._probes = 0
        #: ‖∇L‖² over all components on the last probe that was asked for it.
        self.gradient_norm_squared: float | None = None
        self._initial: dict[str, Parts] | None = None
        if signal.needs_initial:
            self._initial = {c.name: tuple(p.detach().clone() for p in params) for c, params in binding}

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Needed by signals of the optimizer's step. Learning rates are read here, before any schedule."""
        if self.signal.needs_update:
            rates = {
                id(p): float(group.get("initial_lr", group["lr"]))
                for group in optimizer.param_groups
                for p in group["params"]
            }
            self._steps = StepScores(self._model, self._binding, Directions(optimizer), rates, self._row_stride)

    @property
    def is_ready(self) -> bool:
        """Whether it can measure: signals of the optimizer's step cannot before there is an optimizer."""
        return not self.signal.needs_update or self._steps is not None

    @property
    def needs_two_batches(self) -> bool:
        """Whether a probe takes one batch that makes a step, and another that judges it."""
        return self.signal.needs_update and not self._is_same_batch

    def expect_step(self) -> None:
        """Before an optimizer step that will be scored, by its own batch or by the next one."""
        if self._steps is not None:
            self._steps.keep_next((self._training_looks, self._training_looks + 1))

    def take_seconds(self) -> float:
        """Time that it took since the last call to find out what steps are, while they were made."""
        return 0.0 if self._steps is None else self._steps.take_seconds()

    def observe_training(self, step: int) -> None:
        """Scores the gradients of a training batch. Call before the optimizer's step.

        For a signal of the step, the step is the previous one: this batch did not make it.
        """
        if not isinstance(self.signal, GradientSignal) or self._is_same_batch:
            return
        scores = self.signal.score(self._binding.as_trained, self._parts)
        self.error_map = self.error_map.observe(scores, step=step)

    def observe_own_step(self, step: int) -> None:
        """Scores the optimizer's step on the batch that made it. Call after the step, before gradients are cleared."""
        if self._steps is not None:
            scores = self._same_batch.score(self._binding.as_trained, self._parts)
            self.same_batch_map = self.same_batch_map.observe(scores, step=step)
            if self._is_same_batch:
                self.error_map = self.same_batch_map
            self._training_looks += 1

    def _parts(self, component: Component) -> Iterator[PartGradient]:
        if self._steps is not None:
            yield from self._steps.last(component, self._training_looks)
            return
        initials = self._initial[component.name] if self._initial else None
        for index, parameter in enumerate(self._binding.trained[component.name]):
            if parameter.grad is not None:
                yield PartGradient(
                    weight=parameter.detach(), gradient=parameter.grad, initial=initials[index] if initials else None
                )

    def probe(self, batch: Any, *, own: Any = None, step: int, gradient_norm: bool = False) -> dict[str, float]:
        """Measures on a batch that is not trained on, every component on. Moves nothing.

        Args:
            batch: what the scores are measured on.
            own: for signals of the step: another batch, whose gradient makes the step that `batch` judges.
            step: the step that comes next.
            gradient_norm: also measure ‖∇L‖² over all components, by one more backward pass.

        Raises:
            NonFiniteError: the probe's loss is not finite.
        """
        with still(self._model, self._binding):
            scores = self._measure(batch, own if own is not None else batch, step)
            if gradient_norm:
                self._finite_loss(step)(self._model, batch).backward()
                held = self._binding.held.values()
                gradients = [p.grad for parameters in held for p in parameters if p.grad is not None]
                self.gradient_norm_squared = float(
                    torch.stack([at_least_float32(g).square().sum() for g in gradients]).sum()
                )
        self.error_map = self.error_map.observe(scores, step=step)
        self._probes += 1
        return scores

    def _measure(self, batch: Any, own: Any, step: int) -> dict[str, float]:
        loss = self._finite_loss(step)
        if self._steps is None or not isinstance(self.signal, GradientSignal):
            # Signals of gradients see what is trained, low-rank pairs as an adapter's; others what a component is.
            of_gradients, binding = isinstance(self.signal, GradientSignal), self._binding
            probe = Probe(
                model=self._model, partition=binding.as_trained if of_gradients else binding.partition,
                parameters=binding.trained if of_gradients else binding.parameters, batch=batch, loss=loss,
                step=step, initial=self._initial.get if self._initial else None,
            )  # fmt: skip
            return self.signal.measure(probe)
        made, same = self._steps.make(lambda: loss(self._model, own).backward(), self._same_batch, self._probes)
        self.same_batch_map = self.same_batch_map.observe(same, step=step)
        if self._is_same_batch:
            return same
        return self._steps.judge(lambda: loss(self._model, batch).backward(), self.signal, made)

    def _finite_loss(self, step: int) -> Loss:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            value = self._loss(model, batch)
            if not bool(torch.isfinite(value)):
                raise NonFiniteError(f"the loss of the probe before step {step} is {value.item()}, expected a number")
            return value

        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "error_map": self.error_map.to_dict(), "same_batch_map": self.same_batch_map.to_dict(),
            "initial": self._initial, "looks": [self._training_looks, self._probes],
            "steps": None if self._steps is None else self._steps.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error_map = ErrorMap.from_dict(state["error_map"])
        self.same_batch_map = ErrorMap.from_dict(state["same_batch_map"])
        self._initial = state["initial"]
        self._training_looks, self._probes = state["looks"]
        if self._steps is not None and state["steps"] is not None:
            self._steps.load_state_dict(state["steps"])

    def detach(self) -> None:
        """Takes hooks from the optimizer."""
        if self._steps is not None:
            self._steps.detach()
