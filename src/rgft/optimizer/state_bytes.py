"""Bytes of state that an optimizer keeps of a parameter, known before its first step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Optimizer, RMSprop

from rgft.optimizer.muon import is_muon

#: (parameter, share of it that is a slice) → bytes.
StateBytes = Callable[[Tensor, float], int]

#: Of a count of steps, beside the statistics.
COUNT = 4
#: Of bitsandbytes: parameters of fewer elements have state of four bytes; of others, a scale is kept per block.
QUANTISED_FROM, BLOCK = 4096, 256


def tensors_alike(number: int, *, counts: bool = True) -> StateBytes:
    """So many tensors like the parameter, and a count of steps."""
    return lambda parameter, share: math.ceil(number * share * parameter.nbytes) + COUNT * (counts and number > 0)


def state_bytes(optimizer: Optimizer | None) -> StateBytes:
    """What the optimizer will keep.

    Args:
        optimizer: None, and one that is not known here, are taken for AdamW.
    """
    name = "" if optimizer is None else type(optimizer).__name__.lower()
    groups = [] if optimizer is None else optimizer.param_groups
    if isinstance(optimizer, Adafactor) or name == "adafactor":
        first = 1 if any(group.get("beta1") is not None for group in groups) else 0
        return lambda parameter, share: _factored(parameter, share) + math.ceil(first * share * parameter.nbytes)
    if any(is_muon(optimizer, group) for group in groups if optimizer is not None):
        assert optimizer is not None
        matrices = {id(p) for group in groups if is_muon(optimizer, group) for p in group["params"]}
        one, two = tensors_alike(1, counts=False), tensors_alike(2)
        return lambda parameter, share: (one if id(parameter) in matrices else two)(parameter, share)
    if any(base.__module__.startswith("bitsandbytes") for base in type(optimizer).__mro__):
        number = 1 if any(word in name for word in ("lion", "sgd", "rmsprop", "adagrad", "lars")) else 2
        is_8bit = "8bit" in name or getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8
        return lambda parameter, share: number * _in_blocks(math.ceil(share * parameter.numel()), is_8bit=is_8bit)
    if isinstance(optimizer, SGD):
        return tensors_alike(int(any(group["momentum"] for group in groups)), counts=False)
    if isinstance(optimizer, Adam | AdamW):
        return tensors_alike(2 + int(any(group.get("amsgrad") for group in groups)))
    if any("train_mode" in group for group in groups):  # schedule-free: its mean is computed from what it keeps
        return tensors_alike(2 if "betas" in groups[0] else 1, counts=False)
    if "lion" in name:
        return tensors_alike(1, counts=False)
    if isinstance(optimizer, RMSprop):
        return tensors_alike(1 + any(g["momentum"] > 0 for g in groups) + any(g["centered"] for g in groups))
    if isinstance(optimizer, Adagrad):
        return tensors_alike(1)
    return tensors_alike(2)


def _factored(parameter: Tensor, share: float) -> int:
    """A mean per row and one per column of the last two dimensions; of vectors, one per element."""
    if parameter.dim() < 2:
        return math.ceil(share * parameter.nbytes) + COUNT
    rows, columns = parameter.shape[-2:]
    per_matrix = (rows + columns) * parameter.numel() // max(1, rows * columns)
    return per_matrix * parameter.element_size() + COUNT


def _in_blocks(elements: int, *, is_8bit: bool) -> int:
    """A statistic of one byte per element and four per block."""
    if not is_8bit or elements < QUANTISED_FROM:
        return elements * torch.float32.itemsize
    return elements + math.ceil(elements / BLOCK) * torch.float32.itemsize
