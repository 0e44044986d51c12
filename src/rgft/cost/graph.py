"""Reads the operations of a forward pass off its autograd graph.

Every matrix product of the pass left a node that knows its operands' sizes and, through its edges, which parameters
lie upstream of each operand: all that a cost needs. One topological pass gives, per node, the components upstream
(a bit mask) and the depth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rgft.components import Component
from rgft.cost.counting import FUSED_ATTENTION_BACKWARD
from rgft.cost.nodes import FUSED, READERS, VIEWS, Node, is_unreadable, kind
from rgft.cost.operations import Operation, PairShare, Product
from rgft.errors import RGFTError


@dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """What the graph walk must know of a parameter.

    Attributes:
        owners: (component index, fraction of the parameter that it owns); empty for a frozen one.
        mask: bit mask of the owners; of a weight that is frozen while its owner is trained by pairs, shifted by the
            number of components.
        depth: of its layer or its owners; 0 when neither is known.
        in_layer: whether it lies in one of the partition's layers.
        is_sliceable: whether dW can be made for active slices alone.
        drawn: its elements, where dW may be made from a sample of the positions; 0: it may not.
        pairs: low-rank pairs that its owners may have beside it.
    """

    owners: tuple[tuple[int, float], ...]
    mask: int
    depth: int
    in_layer: bool
    is_sliceable: bool = True
    drawn: int = 0
    pairs: tuple[PairShare, ...] = ()


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
            choose = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
            choice = choose(query, key, value, attn_mask.detach(), dropout_p, is_causal, **options)
        if choice != math and kind(result.grad_fn) not in FUSED:
            self.calls.append((result.grad_fn, (query.grad_fn, key.grad_fn, value.grad_fn), attn_mask.grad_fn))


def read_operations(
    loss: Tensor,
    weights: Mapping[int, WeightInfo],
    components: Sequence[Component],
    *,
    after_layers: int,
    rows: int = 1,
    attention: MaskedAttention | None = None,
    elementwise: Collection[str] = (),
) -> list[Operation]:
    """The operations of the pass that made `loss`, in forward order; FLOPs are those of the whole batch.

    Args:
        loss: a scalar with a graph.
        weights: id of a parameter → what it is.
        components: of the partition, in order.
        after_layers: depth of what runs after the last layer.
        rows: of the batch.
        attention: the mode that the pass ran under.
        elementwise: names of custom autograd functions that hold no matrix product.

    Raises:
        RGFTError: nodes whose FLOPs cannot be read.
    """
    if loss.grad_fn is None:
        raise RGFTError("the loss has no graph: expected loss(model, batch) to return a scalar that needs a gradient")
    walk = _Walk(weights, components, after_layers, rows)
    unreadable: list[str] = []
    for node in topological(loss.grad_fn):
        if is_unreadable(node, elementwise):
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

    def __init__(
        self, weights: Mapping[int, WeightInfo], components: Sequence[Component], after_layers: int, rows: int
    ) -> None:  # fmt: skip
        self.weights, self.components, self.after_layers, self.rows = weights, components, after_layers, rows
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
        reader = READERS.get(kind(node))
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
        if kind(node) in FUSED:
            mask = self._union(sources)
            products = (Product(flops=_batch(FUSED_ATTENTION_BACKWARD * flops), upstream=mask),)
        else:
            products = tuple(
                Product(
                    flops=_batch(flops), upstream=self.upstream[source] if source is not None else 0,
                    shares=None if info is None else info.owners,
                    is_whole=info is not None and not info.is_sliceable,
                    # Not where each example has one position.
                    is_drawn=info is not None and 0 < 2 * info.drawn * self.rows < flops,
                )
                for source, info in zip(sources, infos, strict=True)
            )  # fmt: skip
        owned = [info for info in infos if info is not None]
        owners = owned[0].owners if owned else self._core_owners(node)
        return Operation(
            kind=kind(node), depth=self.depth[node], flops=_batch(flops), products=products, owners=owners,
            pairs=owned[0].pairs if owned else (),
        )  # fmt: skip

    def _weight(self, node: Node) -> WeightInfo | None:
        while node is not None and kind(node) in VIEWS:
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
        inside = [n for n in topological(out, stop={*inputs, mask}) if n in self.operations]
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


def topological(root: Node, stop: Collection[Node] = ()) -> Iterator[Node]:
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
