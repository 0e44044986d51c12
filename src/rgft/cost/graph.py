"""Reads the operations of a forward pass off its autograd graph.

Every matrix product of the pass left a node that knows its operands' sizes and, through its edges, which parameters
lie upstream of each operand: all that a cost needs. One topological pass gives, per node, the components upstream
(a bit mask) and the depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

from rgft.components import Component
from rgft.cost.counting import FUSED_ATTENTION_BACKWARD, grouped_mm_flops, matmul_flops
from rgft.cost.model import Operation, Product
from rgft.errors import RGFTError

Node = Any


@dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """What the graph walk must know of a parameter.

    Attributes:
        owners: (component index, fraction of the parameter that it owns); empty for a frozen one.
        mask: bit mask of the owners.
        depth: of its layer or its owners; 0 when neither is known.
        in_layer: whether it lies in one of the partition's layers.
    """

    owners: tuple[tuple[int, float], ...]
    mask: int
    depth: int
    in_layer: bool


#: Nodes between a parameter and the product it is the weight of that leave its elements what they are.
_VIEWS = frozenset(
    f"{name}Backward"
    for name in (
        "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Alias", "Slice", "Select", "Split",
        "SplitWithSizes", "Unbind", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "AsStrided", "Unfold", "MoveDim",
    )
)  # fmt: skip

#: Nodes that do counted work which this file cannot read: found by name, refused.
_UNREADABLE = re.compile(r"mm(?!r)|matmul|conv|linear|attention|rnn|lstm|gru|bilinear|cdist|einsum", re.IGNORECASE)


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
        inner = left.shape[-1] if left is not None else right.shape[-2]
        return matmul_flops(_out_shape(node), inner), operands

    return read


def _grouped_mm(node: Node) -> tuple[int, tuple[int, ...]]:
    left, right = node._saved_self, node._saved_mat2
    out = _out_shape(node)
    left_shape = tuple(left.shape) if left is not None else (*out[:-1], right.shape[-2])
    right_shape = tuple(right.shape) if right is not None else (left.shape[-1], out[-1])
    return grouped_mm_flops(left_shape, right_shape), (0, 1)


def _convolution(node: Node) -> tuple[int, tuple[int, ...]]:
    shapes = (list(node._saved_input.shape), list(node._saved_weight.shape), list(_out_shape(node)))
    return conv_flop_count(*shapes, transposed=node._saved_transposed), (0, 1)


def _attention(node: Node) -> tuple[int, tuple[int, ...]]:
    shapes = [tuple(tensor.shape) for tensor in (node._saved_query, node._saved_key, node._saved_value)]
    return sdpa_flop_count(*shapes), (0, 1, 2)


_FUSED = frozenset(
    f"ScaledDotProduct{name}Backward"
    for name in ("FlashAttentionForCpu", "FlashAttention", "EfficientAttention", "CudnnAttention")
)

#: Node kind → (forward FLOPs, which inputs of the node have a gradient product).
_READERS: Mapping[str, Callable[[Node], tuple[int, tuple[int, ...]]]] = {
    "AddmmBackward": _addmm,
    "MmBackward": _mm,
    "BmmBackward": _batched("_saved_self", "_saved_mat2", (0, 1)),
    "BaddbmmBackward": _batched("_saved_batch1", "_saved_batch2", (1, 2)),
    "GroupedMmBackward": _grouped_mm,
    "ConvolutionBackward": _convolution,
    **dict.fromkeys(_FUSED, _attention),
}


def _out_shape(node: Node) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _kind(node: Node) -> str:
    return re.sub(r"\d+$", "", node.name())


class MaskedAttention(TorchFunctionMode):
    """Notes attention calls that run unfused only because their mask needs a gradient (T5's position bias).

    With the bias frozen the same call would take the fused kernel, whose backward costs differently.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Node, tuple[Node, Node, Node], Node]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._note(result, *args, **(kwargs or {}))
        return result

    def _note(
        self, result: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        if attn_mask is None or not attn_mask.requires_grad or result.grad_fn is None:
            return
        math = torch.nn.attention.SDPBackend.MATH.value  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            choice = torch._fused_sdp_choice(
                query, key, value, attn_mask.detach(), dropout_p, is_causal, **options
            )  # fmt: skip
        if choice != math and not _kind(result.grad_fn) in _FUSED:
            self.calls.append(
                (result.grad_fn, (query.grad_fn, key.grad_fn, value.grad_fn), attn_mask.grad_fn)
            )  # fmt: skip


def read_operations(
    loss: Tensor,
    weights: Mapping[int, WeightInfo],
    components: Sequence[Component],
    *,
    after_layers: int,
    attention: MaskedAttention | None = None,
    elementwise: Collection[str] = (),
) -> list[Operation]:
    """The operations of the pass that made `loss`, in forward order; FLOPs are those of the whole batch.

    Args:
        loss: a scalar with a graph.
        weights: id of a parameter → what it is.
        components: of the partition, in order.
        after_layers: depth of what runs after the last layer.
        attention: the mode that the pass ran under.
        elementwise: names of custom autograd functions that hold no matrix product.

    Raises:
        RGFTError: nodes whose FLOPs cannot be read.
    """
    if loss.grad_fn is None:
        raise RGFTError("the loss has no graph: expected loss(model, batch) to return a scalar that needs a gradient")
    walk = _Walk(weights, components, after_layers)
    unreadable: list[str] = []
    for node in _topological(loss.grad_fn):
        if isinstance(node, BackwardCFunction) and node.name() not in elementwise:
            unreadable.append(f"custom autograd function {node.name()}")
        elif _kind(node) not in _READERS and _UNREADABLE.search(_kind(node)):
            unreadable.append(node.name())
        walk.visit(node)
    if unreadable:
        raise RGFTError(
            "the FLOPs of these cannot be read off the autograd graph: " + ", ".join(sorted(set(unreadable))) + "; "
            "trace the plain model (before attaching, compiling, quantising or swapping kernels), or name custom "
            "functions without matrix products in elementwise=(…)"
        )
    for call in attention.calls if attention else ():
        walk.merge(*call)
    return list(walk.operations.values())


class _Walk:
    """State of the topological pass."""

    def __init__(self, weights: Mapping[int, WeightInfo], components: Sequence[Component], after_layers: int) -> None:
        self.weights, self.components, self.after_layers = weights, components, after_layers
        self.upstream: dict[Node, int] = {}
        self.depth: dict[Node, int] = {}
        self.operations: dict[Node, Operation] = {}

    def visit(self, node: Node) -> None:
        info = self._parameter(node)
        if info is not None:
            self.upstream[node], self.depth[node] = info.mask, info.depth
            return
        inputs = [source for source, _ in node.next_functions if source is not None]
        mask = 0
        for source in inputs:
            mask |= self.upstream[source]
        self.upstream[node] = mask
        self.depth[node] = max((self.depth[source] for source in inputs), default=0)
        reader = _READERS.get(_kind(node))
        if reader is not None:
            self.operations[node] = self._operation(node, *reader(node))

    def _parameter(self, node: Node) -> WeightInfo | None:
        variable = getattr(node, "variable", None)
        return None if variable is None else self.weights.get(id(variable))

    def _operation(self, node: Node, flops: int, operands: tuple[int, ...]) -> Operation:
        sources = [node.next_functions[index][0] for index in operands]
        infos = [self._weight(source) for source in sources]
        outside = any(info is not None and not info.in_layer for info in infos)
        if outside and max((self.depth[s] for s, i in zip(sources, infos, strict=True) if s and not i), default=0):
            # A weight outside the layers whose input comes out of one: a head, perhaps tied to the embedding.
            self.depth[node] = max(self.depth[node], self.after_layers)
        if _kind(node) in _FUSED:
            mask = self._union(sources)
            products = (Product(flops=_batch(FUSED_ATTENTION_BACKWARD * flops), upstream=mask),)
        else:
            products = tuple(
                Product(
                    flops=_batch(flops), upstream=self.upstream[source] if source is not None else 0,
                    shares=None if info is None else info.owners,
                )
                for source, info in zip(sources, infos, strict=True)
            )  # fmt: skip
        owned = [info for info in infos if info is not None]
        owners = owned[0].owners if owned else self._core_owners(node)
        return Operation(
            kind=_kind(node), depth=self.depth[node], flops=_batch(flops), products=products, owners=owners
        )  # fmt: skip

    def _weight(self, node: Node) -> WeightInfo | None:
        while node is not None and _kind(node) in _VIEWS:
            node = node.next_functions[0][0]
        return None if node is None else self._parameter(node)

    def _union(self, sources: Sequence[Node]) -> int:
        mask = 0
        for source in sources:
            mask |= self.upstream[source] if source is not None else 0
        return mask

    def _core_owners(self, node: Node) -> tuple[tuple[int, float], ...]:
        mask, depth = self.upstream[node], self.depth[node]
        near = [i for i, c in enumerate(self.components) if c.depth == depth and mask >> i & 1]
        chosen = [i for i in near if self.components[i].kind in ("head", "attention", "layer")] or near
        total = sum(self.components[i].numel for i in chosen)
        return tuple((i, self.components[i].numel / total) for i in chosen)

    def merge(self, out: Node, inputs: tuple[Node, Node, Node], mask: Node) -> None:
        """Makes one operation of the products of an unfused attention call, with the fused alternative."""
        inside = [n for n in _topological(out, stop={*inputs, mask}) if n in self.operations]
        parts = [self.operations[node] for node in inside]
        flops = sum(part.flops[0] for part in parts)
        merged = Operation(
            kind="MaskedAttention", depth=max(part.depth for part in parts), flops=_batch(flops),
            products=tuple(product for part in parts for product in part.products), owners=parts[-1].owners,
            fused=Product(flops=_batch(FUSED_ATTENTION_BACKWARD * flops), upstream=self._union(inputs)),
            mask=self.upstream[mask],
        )  # fmt: skip
        self.operations[inside[-1]] = merged
        for node in inside[:-1]:
            del self.operations[node]


def _batch(flops: float) -> tuple[float, float, float]:
    return (float(flops), 0.0, 0.0)


def _topological(root: Node, stop: Collection[Node] = ()) -> Iterator[Node]:
    """Nodes from the leaves to `root`, each after all its inputs; nothing at or below `stop`."""
    done: set[Node] = {*stop, None}
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            yield node
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in reversed(node.next_functions))

