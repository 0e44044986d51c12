"""Values of parameters, buffers and optimizer state, to be put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """What training changes: weights, their optimizer state, learning rates, and the model's buffers.

    Args:
        model: whose buffers are kept.
        parameters: that are trained.
        optimizer: that trains them.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._weights = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._states = [
            (p, {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()})
            for p in parameters
        ]
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._rates = [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all values back, into the same tensors where they still exist."""
        for target, value in [*self._weights, *self._buffers]:
            target.copy_(value)
            target.grad = None
        for parameter, kept in self._states:
            if not kept:
                self._optimizer.state.pop(parameter, None)
                continue
            state = self._optimizer.state[parameter]
            for key in set(state) - set(kept):
                del state[key]
            for key, value in kept.items():
                held = state.get(key)
                if isinstance(value, Tensor) and isinstance(held, Tensor):
                    held.copy_(value)
                else:
                    state[key] = value.clone() if isinstance(value, Tensor) else value
        for group, (rate, initial) in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
            if initial is not None:
                group["initial_lr"] = initial
