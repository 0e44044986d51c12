"""Probes move nothing: weights, gradients, moments, random state, buffers and modes are as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rgft.execution.binding import Binding
from rgft.execution.switching import everything_on


@contextmanager
def still(model: nn.Module, binding: Binding) -> Iterator[None]:
    """Inside, the model is in eval mode, every component requires gradients, and none has one yet.

    Afterwards modes, `requires_grad`, gradients, buffers and the random state of all devices are restored, also when
    the body raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for m in model.modules() for b in m.buffers(recurse=False) if b is not None]
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    with torch.random.fork_rng(devices=devices), everything_on(binding):
        try:
            for module, _ in modes:
                module.training = False
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
