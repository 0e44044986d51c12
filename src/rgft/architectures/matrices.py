"""Modules that multiply what they are given by a matrix, and its size."""

from __future__ import annotations

from typing import Any

from torch import nn


def has_matrix(module: nn.Module) -> bool:
    """Linear layers, Transformers' Conv1D among them, and convolutions: what has a matrix and is no table."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1 and not isinstance(module, nn.Embedding)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, however its weight is stored; None of what is none."""
    layer: Any = module
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    if is_transposed(module):
        return int(layer.nx), int(layer.nf)
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether it is Transformers' Conv1D (GPT-2), a linear layer whose weight has its outputs last."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def matrix_size(module: nn.Module) -> tuple[int, int]:
    """How many numbers an output of a module that has a matrix is a sum over, and how many outputs it has."""
    size = linear_size(module)
    if size is not None:
        return size
    weight = module.get_parameter("weight")
    return weight.numel() // weight.shape[0], weight.shape[0]
