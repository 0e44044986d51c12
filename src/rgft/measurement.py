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

from rgft.blocks import row_blocks, rows_with_gradient
from rgft.components import Component
from rgft.error_map import ErrorMap
from rgft.errors import NonFiniteError
from rgft.execution.binding import Binding
from rgft.execution.directions import Directions
from rgft.execution.probing import still
from rgft.signals.base import GradientSignal, PartGradient, Parts, Probe, Signal, at_least_float32
from rgft.signals.decrease import PredictedDecrease

Loss = Callable[[nn.Module, Any], Tensor]


class Measurement:
    """Owns the error maps of a run and fills them.

    Args:
        model, binding: what is measured.
        signal: the score.
        loss: mean loss of a batch, a scalar.
        beta, bias_correction: of the maps.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, signal: Signal, loss: Loss, *, beta: float, bias_correction: bool
    ) -> None:
        self._model, self._binding, self._loss = model, binding, loss
        self.signal = signal
        empty = ErrorMap.empty(binding.partition.names, beta=beta, bias_correction=bias_correction)
        self.error_map, self.same_batch_map = empty, empty
        self._same_batch = PredictedDecrease()
        self._directions: Directions | None = None
        self._rates: dict[int, float] = {}
        # Of a lookup table a batch reads few rows; with the rest, over half the elements of a small encoder.
        self._tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        #: ‖∇L‖² over all components on the last probe that was asked for it.
        self.gradient_norm_squared: float | None = None
        self._initial: dict[str, Parts] | None = None
        if signal.needs_initial:
            self._initial = {c.name: tuple(p.detach().clone() for p in params) for c, params in binding}

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Needed by signals of the optimizer's step. Learning rates are read here, before any schedule."""
        if self.signal.needs_update:
            self._directions = Directions(optimizer)
        self._rates = {
            id(p): float(group.get("initial_lr", group["lr"]))
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def _step_size(self, parameter: Tensor) -> float:
        """Δθ at reference learning rate is the direction times this."""
        return -self._rates.get(id(parameter), 1.0)

    def observe_training(self, step: int) -> None:
        """Scores the gradients of a training batch. Call before the optimizer's step.

        For a signal of the step, the step is the previous one: this batch did not make it.
        """
        if not isinstance(self.signal, GradientSignal):
            return
        scores = self.signal.score(self._binding.partition, self._parts)
        self.error_map = self.error_map.observe(scores, step=step)

    def observe_own_step(self, step: int) -> None:
        """Scores the optimizer's step on the batch that made it. Call after the step, before gradients are cleared."""
        if self._directions is not None:
            scores = self._same_batch.score(self._binding.partition, self._parts)
            self.same_batch_map = self.same_batch_map.observe(scores, step=step)

    def _parts(self, component: Component) -> Iterator[PartGradient]:
        initials = self._initial[component.name] if self._initial else None
        for index, parameter in enumerate(self._binding.parameters[component.name]):
            if parameter.grad is None:
                continue
            if self._directions is not None:
                yield from self._step_parts(parameter, parameter.grad)
                continue
            yield PartGradient(
                weight=parameter.detach(), gradient=parameter.grad, initial=initials[index] if initials else None
            )

    def _step_parts(self, parameter: nn.Parameter, gradient: Tensor) -> Iterator[PartGradient]:
        """Gradient and last step, block by block; nothing before the parameter's first step."""
        assert self._directions is not None
        blocks = rows_with_gradient if id(parameter) in self._tables else row_blocks
        for rows in blocks(gradient):
            update = self._directions.last(parameter, self._step_size(parameter), rows)
            if update is None:
                return
            yield PartGradient(weight=parameter.detach()[rows], gradient=gradient[rows], update=update)

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
        updates: dict[str, Parts] = {}
        with still(self._model, self._binding):
            if self._directions is not None:
                updates = self._steps_from(own if own is not None else batch, step)
            probe = Probe(
                model=self._model, partition=self._binding.partition, parameters=self._binding.parameters, batch=batch,
                loss=self._finite_loss(step), step=step, update=updates.get if updates else None,
                initial=self._initial.get if self._initial else None,
            )  # fmt: skip
            scores = self.signal.measure(probe)
            if gradient_norm:
                self._finite_loss(step)(self._model, batch).backward()
                gradients = [p.grad for _, parameters in self._binding for p in parameters if p.grad is not None]
                self.gradient_norm_squared = float(
                    torch.stack([at_least_float32(g).square().sum() for g in gradients]).sum()
                )
        self.error_map = self.error_map.observe(scores, step=step)
        return scores

    def _steps_from(self, batch: Any, step: int) -> dict[str, Parts]:
        """The step that each component's kept moments and the gradient of `batch` would make."""
        self._finite_loss(step)(self._model, batch).backward()
        updates: dict[str, Parts] = {}

        def parts(component: Component) -> Iterator[PartGradient]:
            steps: list[Tensor] = []
            for parameter in self._binding.parameters[component.name]:
                gradient, parameter.grad = parameter.grad, None
                steps.append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
                yield from self._turned_into_step(parameter, steps[-1])
            updates[component.name] = tuple(steps)

        scores = self._same_batch.score(self._binding.partition, parts)
        self.same_batch_map = self.same_batch_map.observe(scores, step=step)
        return updates

    def _turned_into_step(self, parameter: nn.Parameter, gradient: Tensor) -> Iterator[PartGradient]:
        """Gradient and the step it would make, block by block; each block becomes its step once it has been scored."""
        assert self._directions is not None
        for rows in row_blocks(parameter):
            block = gradient[rows]
            update = self._directions.would_make(parameter, block, self._step_size(parameter), rows)
            if update is None:
                update = torch.zeros_like(block)
            yield PartGradient(weight=parameter.detach()[rows], gradient=block, update=update)
            block.copy_(update)

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
            "initial": self._initial,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error_map = ErrorMap.from_dict(state["error_map"])
        self.same_batch_map = ErrorMap.from_dict(state["same_batch_map"])
        self._initial = state["initial"]
