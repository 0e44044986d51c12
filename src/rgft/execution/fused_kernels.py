"""Tensors as torch's fused optimizer kernels need them (decision 7).

Such a kernel goes through a parameter, its gradient and its state by pointer, as blocks of memory in one order. A
column slice of a weight that is stored by rows is no such block: the kernel would write into the neighbours. So where
an optimizer's fused groups hold slices, their weights are stored slice by slice, and gradients and states alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from rgft.errors import OptimizerError
from rgft.execution.binding import Binding
from rgft.execution.optimizers import sliced, unknown_kernels, unwrapped


class FusedKernels:
    """Prepares slices for fused steps: now, after the optimizer's state was loaded, and before each step.

    Before each step, because groups may be switched to fused at any time, and gradients, states and weights replaced.
    Without fused groups nothing is touched.

    Args:
        optimizer: may be wrapped.
        binding: what it trains.

    Raises:
        OptimizerError: (also by `optimizer.step()`) it has fused groups with slices, and is none of torch's own.
    """

    def __init__(self, optimizer: Optimizer, binding: Binding) -> None:
        optimizer = unwrapped(optimizer)
        self._binding = binding
        self._views = sliced(binding)
        self._prepare(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._prepare),
            optimizer.register_load_state_dict_post_hook(self._prepare),
        ]

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        if problems := unknown_kernels(optimizer, self._views):
            raise OptimizerError(problems[0])
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            views = [p for p in group["params"] if p in self._views]
            self._binding.make_dense(views)
            for view in views:
                _lay_out_alike(view, optimizer.state.get(view, {}))
            if isinstance(optimizer, SGD):
                _begin_momentum(optimizer, group)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def _lay_out_alike(view: nn.Parameter, state: dict[str, Any]) -> None:
    """Gives the gradient and the state of a view its strides."""
    strides, gradient = view.stride(), view.grad
    if gradient is not None and gradient.stride() != strides:
        view.grad = _laid_out_as(view, gradient)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.stride() != strides and value.shape == view.shape:
            state[key] = _laid_out_as(view, value)


def _laid_out_as(view: Tensor, value: Tensor) -> Tensor:
    return torch.empty_strided(view.size(), view.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _begin_momentum(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """The fused SGD wants momentum of all parameters or of none, and components come on one after another.

    From zeros, the first step is that of no momentum, unless it is dampened; then torch raises its error.
    """
    if not group["momentum"] or group["dampening"]:
        return
    for parameter in group["params"]:
        if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
