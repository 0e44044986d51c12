"""Tensors in blocks of rows that fit a core's cache.

What takes several elementwise passes takes them block by block, so that memory is read once, and no temporary is as
large as a weight.

Sums over a weight may be estimated from a sample of its rows: every fourth, say, times four. With each row in its turn
the estimate is unbiased.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

from torch import Tensor

#: Elements of a block: with the few tensors read beside it, within the 1–2 MB that are a core's own.
BLOCK = 1 << 16

#: Weights of fewer elements are read whole: a sample would be noisier, and hardly faster.
SAMPLED_FROM = 1 << 12

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


@dataclass(frozen=True, kw_only=True)
class RowSample:
    """Every `stride`-th row of each large weight, from row `turn` modulo `stride` on.

    Over `stride` turns in a row, or over a random one, each row is read equally often, so that a sum over the sampled
    rows times `factor` has the sum over all rows as its mean.
    """

    stride: int = 1
    turn: int = 0

    def factor(self, tensor: Tensor) -> int:
        """What a sum over the sampled rows is multiplied by."""
        is_large = tensor.dim() > 0 and tensor.shape[0] >= self.stride and tensor.numel() >= SAMPLED_FROM
        return self.stride if is_large else 1

    def blocks(self, tensor: Tensor) -> Iterator[Rows]:
        """Indices of the sampled rows, in blocks as of `row_blocks`."""
        stride = self.factor(tensor)
        if stride == 1:
            yield from row_blocks(tensor)
            return
        rows = tensor.shape[0]
        step = rows if tensor.device.type != "cpu" else stride * max(1, BLOCK * rows // tensor.numel())
        for start in range(self.turn % stride, rows, step):
            yield slice(start, start + step, stride)


EVERY_ROW = RowSample()


def rows_with_gradient(gradient: Tensor, sample: RowSample = EVERY_ROW) -> Iterator[Rows]:
    """Indices, in blocks, of the rows of a lookup table that a batch has read, of those sampled.

    The others add nothing to a product with the gradient. On accelerators, where to find them would be to wait for the
    device, none is left out.
    """
    if gradient.device.type != "cpu" or gradient.dim() != 2:
        yield from sample.blocks(gradient)
        return
    stride = sample.factor(gradient)
    start = sample.turn % stride
    seen = gradient[start::stride].any(dim=1).nonzero().squeeze(1) * stride + start
    yield from seen.split(max(1, BLOCK // max(1, gradient.shape[1])))
