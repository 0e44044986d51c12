"""The step an optimizer makes, at reference learning rate: Δθ without multiplier, schedule or decay.

Signals compare components by what a step of equal learning rate would do, so that no component is rewarded for its own
multiplier. For the Adam family the direction is read off the moments; for SGD off the momentum buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from rgft.blocks import Rows
from rgft.errors import OptimizerError


class Directions:
    """Reads steps off the state of Adam, AdamW or SGD. Tensors returned are new and detached.

    Raises:
        OptimizerError: another optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Adam | AdamW | SGD):
            raise OptimizerError(
                f"signals that need the optimizer's step know Adam, AdamW and SGD; found {type(optimizer).__name__}. "
                "Use one of these, or a signal without steps, e.g. signal='grad_norm'"
            )
        self._optimizer = optimizer
        self._groups: dict[int, dict[str, Any]] = {}
        self._count = -1

    def _group(self, parameter: Tensor) -> dict[str, Any] | None:
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if count != self._count:
            self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
            self._count = count
        return self._groups.get(id(parameter))

    def last(self, parameter: Tensor, scale: float = 1.0, rows: Rows = ...) -> Tensor | None:
        """Direction −Δθ/η of the step just made, times `scale`; None before the parameter's first step.

        Args:
            parameter: whose step.
            scale: factor.
            rows: the part of it that is wanted.
        """
        group, state = self._group(parameter), self._optimizer.state.get(parameter)
        if group is None or not state:
            return None
        if "exp_avg" in state:
            second = _second(state, group)[rows]
            return _adam(state["exp_avg"][rows], second, float(state["step"]), group, scale)
        buffer = state.get("momentum_buffer")
        return None if buffer is None else buffer[rows] * scale

    @torch.no_grad()
    def would_make(
        self, parameter: Tensor, gradient: Tensor, scale: float = 1.0, rows: Rows = ...
    ) -> Tensor | None:  # fmt: skip
        """Direction of the step that `gradient` would make from the moments kept, times `scale`.

        The state is not changed.

        Args:
            parameter: whose step.
            gradient: of those `rows`.
            scale: factor.
            rows: the part of it that is wanted.
        """
        group = self._group(parameter)
        if group is None:
            return None
        state = self._optimizer.state.get(parameter) or {}
        if "betas" not in group:
            momentum, buffer = group.get("momentum", 0.0), state.get("momentum_buffer")
            return gradient * scale if buffer is None else (gradient + momentum * buffer[rows].to(gradient)).mul_(scale)
        beta1, beta2 = group["betas"]
        if "exp_avg" not in state:
            return _adam((1 - beta1) * gradient, (1 - beta2) * gradient.square(), 1.0, group, scale)
        first = torch.lerp(state["exp_avg"][rows].to(gradient), gradient, 1 - beta1)
        second = state["exp_avg_sq"][rows].to(gradient).mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if group.get("amsgrad"):
            second = torch.maximum(second, state["max_exp_avg_sq"][rows].to(gradient))
        return _adam(first, second, float(state["step"]) + 1.0, group, scale)


def _second(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    return state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]


@torch.no_grad()
def _adam(first: Tensor, second: Tensor, step: float, group: dict[str, Any], scale: float) -> Tensor:
    """scale · (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε), in as few passes over memory as it takes."""
    if scale == 0.0:
        return torch.zeros_like(first)
    beta1, beta2 = group["betas"]
    factor = (1.0 - beta1**step) / scale
    root = math.sqrt(1.0 - beta2**step)
    denominator = second.sqrt().mul_(factor / root).add_(group["eps"] * factor)
    return torch.div(first, denominator, out=denominator)
