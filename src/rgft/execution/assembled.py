"""The general way to use a split weight: put it together, differentiably, whenever a module reads it.

Any module works that reads its parameter as an attribute (`nn.MultiheadAttention`, 3-D expert weights, convolutions,
embeddings). The forward copies nothing; the backward makes the dense dW and hands each active view its slice, so it
saves optimizer state and gradients but no dW work. `linear.py` is the path that saves that too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rgft.execution.split_weight import Range, SplitWeight


class _Assemble(torch.autograd.Function):
    """Fused values forward, slices of dW backward."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, dim: int, ranges: tuple[Range, ...], *views: Tensor) -> Tensor:
        ctx.dim, ctx.ranges = dim, ranges
        return data.view_as(data)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dense,) = grad_outputs
        # Copies: the dense dW may belong to another branch of the graph too, and must not outlive this call.
        slices = [
            dense.narrow(ctx.dim, start, stop - start).clone(memory_format=torch.contiguous_format) if needed else None
            for (start, stop), needed in zip(ctx.ranges, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *slices


def assemble(split: SplitWeight) -> Tensor:
    """The whole weight as the module would see it, with a graph to the active views if there are any."""
    if not torch.is_grad_enabled():
        return split.data
    active = split.active()
    if not active:
        return split.data
    return _Assemble.apply(split.data, split.dim, tuple(r for r, _ in active), *(v for _, v in active))  # type: ignore[no-any-return]
