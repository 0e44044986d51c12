"""Tensors in blocks of rows that fit a core's cache.

What takes several elementwise passes takes them block by block, so that memory is read once, and no temporary is as
large as a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType

from torch import Tensor

#: Elements of a block: with the few tensors read beside it, within the 1–2 MB that are a core's own.
BLOCK = 1 << 16

#: What indexes a block.
Rows = slice | EllipsisType | Tensor


def row_blocks(tensor: Tensor) -> Iterator[Rows]:
    """Indices along the first dimension that cover the tensor; one for all of it on accelerators, where launches cost
    more than passes."""
    if tensor.device.type != "cpu" or tensor.dim() == 0 or tensor.numel() <= BLOCK:
        yield ...
        return
    step = max(1, BLOCK * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], step):
        yield slice(start, start + step)


def rows_with_gradient(gradient: Tensor) -> Iterator[Rows]:
    """Indices, in blocks, of the rows of a lookup table that a batch has read.

    The others add nothing to a product with the gradient. On accelerators, where to find them would be to wait for the
    device, none is left out.
    """
    if gradient.device.type != "cpu" or gradient.dim() != 2:
        yield from row_blocks(gradient)
        return
    seen = gradient.any(dim=1).nonzero().squeeze(1)
    yield from seen.split(max(1, BLOCK // max(1, gradient.shape[1])))
