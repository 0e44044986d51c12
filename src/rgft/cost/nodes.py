"""What single autograd nodes tell: their forward FLOPs and which of their inputs have a gradient product."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.autograd.function import BackwardCFunction
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

from rgft.cost.counting import grouped_mm_flops, matmul_flops

#: An autograd node; PyTorch types none of the attributes read here.
Node = Any

#: Nodes between a parameter and the product it is the weight of that leave its elements what they are.
VIEWS = frozenset(
    f"{name}Backward"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Alias", "Slice", "Select",
        "Split", "SplitWithSizes", "Unbind", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "AsStrided",
    )
)  # fmt: skip

#: Nodes of matrix products that this file cannot read: found by name, refused.
_UNREADABLE = re.compile(r"[Mm]mBackward|ScaledMm|Matmul|Conv|Linear|Attention|Rnn|Lstm|Gru|Cdist")


def _addmm(node: Node) -> tuple[int, tuple[int, ...]]:
    (m, k), (_, n) = node._saved_mat1_sym_sizes, node._saved_mat2_sym_sizes
    return matmul_flops((m, n), k), (1, 2)


def _mm(node: Node) -> tuple[int, tuple[int, ...]]:
    (m, k), (_, n) = node._saved_self_sym_sizes, node._saved_mat2_sym_sizes
    return matmul_flops((m, n), k), (0, 1)


def _batched(first: str, second: str, operands: tuple[int, int]) -> Callable[[Node], tuple[int, tuple[int, ...]]]:
    def read(node: Node) -> tuple[int, tuple[int, ...]]:
        # An operand is saved only where the other one's gradient may be asked for, and either gives the inner size.
        left, right = getattr(node, first), getattr(node, second)
        inner = right.shape[-2] if left is None else left.shape[-1]
        return matmul_flops(_out_shape(node), inner), operands

    return read


def _grouped_mm(node: Node) -> tuple[int, tuple[int, ...]]:
    saved: tuple[Any, Any] = (node._saved_self, node._saved_mat2)
    left, right = (None if tensor is None else tuple(tensor.shape) for tensor in saved)
    out = _out_shape(node)
    left = left or (*out[:-1], (right or out)[-2])
    return grouped_mm_flops(left, right or (left[-1], out[-1])), (0, 1)


def _convolution(node: Node) -> tuple[int, tuple[int, ...]]:
    shapes = (list(node._saved_input.shape), list(node._saved_weight.shape), list(_out_shape(node)))
    return conv_flop_count(*shapes, transposed=node._saved_transposed), (0, 1)


def _attention(node: Node) -> tuple[int, tuple[int, ...]]:
    shapes = [tuple(tensor.shape) for tensor in (node._saved_query, node._saved_key, node._saved_value)]
    return sdpa_flop_count(*shapes), (0, 1, 2)


FUSED = frozenset(
    f"ScaledDotProduct{name}Backward"
    for name in ("FlashAttentionForCpu", "FlashAttention", "EfficientAttention", "CudnnAttention")
)

#: Node kind → (forward FLOPs, which inputs of the node have a gradient product).
READERS: Mapping[str, Callable[[Node], tuple[int, tuple[int, ...]]]] = {
    "AddmmBackward": _addmm,
    "MmBackward": _mm,
    "BmmBackward": _batched("_saved_self", "_saved_mat2", (0, 1)),
    "BaddbmmBackward": _batched("_saved_batch1", "_saved_batch2", (1, 2)),
    "GroupedMmBackward": _grouped_mm,
    "ConvolutionBackward": _convolution,
    **dict.fromkeys(FUSED, _attention),
}


def _out_shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def kind(node: Node) -> str:
    """Name of the node without its overload number."""
    return re.sub(r"\d+$", "", node.name())


def is_unreadable(node: Node, elementwise: Collection[str]) -> bool:
    """Whether the node may hold matrix products that nothing here can read.

    Custom autograd functions may hold anything, and what fused or quantised kernels do inside is not counted by
    `FlopCounterMode` either: unless named in `elementwise` they are refused.
    """
    if isinstance(node, BackwardCFunction):
        return node.name() not in elementwise  # pyright: ignore[reportAttributeAccessIssue]
    name = kind(node)
    return name not in READERS and not name.startswith("Upsample") and _UNREADABLE.search(name) is not None
