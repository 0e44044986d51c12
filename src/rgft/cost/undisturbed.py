"""Looking at a model's graph without a trace left on it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """All parameters need gradients inside; RNG, buffers, modes and flags are put back."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    checkpointing = [module for module in modules if getattr(module, "gradient_checkpointing", False) is True]
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    contents = [(b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index for p, _ in flags if p.device.type == "cuda"})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter, _ in flags:
                parameter.requires_grad_(True)
            _set_checkpointing(checkpointing, False)
            yield
    finally:
        random.setstate(state)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        _set_checkpointing(checkpointing, True)
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _set_checkpointing(modules: Sequence[nn.Module], value: bool) -> None:
    for module in modules:
        setattr(module, "gradient_checkpointing", value)  # noqa: B010
