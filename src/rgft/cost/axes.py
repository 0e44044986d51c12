"""FLOPs of operations by axis, given what is on and in which form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rgft.cost.operations import Coefficients, Operation, add

#: F, dX, dW of the model's own weights, F done again, and all that low-rank pairs cost beside.
Axes = tuple[Coefficients, Coefficients, Coefficients, Coefficients, Coefficients]

_ZERO: Coefficients = (0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Forms:
    """What components do in a step, by index.

    Attributes:
        mask: bits of what is on.
        on: whether it is on.
        paired: on, and trained by pairs.
        carried: off, with pairs that are part of the model.
        freezes_others: see `CostModel`.
        positions: share of them that weight gradients are made from.
    """

    mask: int
    on: Sequence[bool]
    paired: frozenset[int]
    carried: frozenset[int]
    freezes_others: bool
    positions: float = 1.0

    def is_dense(self, index: int, op: Operation) -> bool:
        """Whether the component's dW of that operation's weight is made."""
        if index not in self.paired:
            return self.on[index]
        return not self.freezes_others and all(pair.component != index for pair in op.pairs)


def by_axis(operations: Collection[Operation], forms: Forms, cached_below: int, twice: range) -> Axes:
    """FLOPs of operations with components on in these forms, those of depths `twice` recomputed."""
    forward = dx = dw = recomputed = pairs = _ZERO
    for op in operations:
        own = pairs_beside(op, forms.carried) + pairs_beside(op, forms.paired)
        if op.depth >= cached_below or op.depth == 0:
            forward, pairs = add(forward, op.flops), add(pairs, op.flops, own)
        if op.depth in twice:
            recomputed = add(recomputed, op.flops, 1.0 + own)
        if own:  # of a pair that is trained: dA, dB, and the gradient of x Aᵀ, which dA needs
            trained = [pair for pair in op.pairs if pair.component in forms.paired]
            pairs = add(pairs, op.flops, sum(pair.total + pair.outputs for pair in trained))
        for product in op.products_for(forms.mask):
            if not product.upstream & forms.mask:
                continue
            if product.shares is None:
                dx, pairs = add(dx, product.flops), add(pairs, product.flops, pairs_in_dx(op, forms))
                continue
            dense = [share for index, share in product.shares if forms.is_dense(index, op)]
            # A product that is made for the whole weight is made as soon as one owner wants it.
            share = sum(share for _, share in product.shares) if product.is_whole and dense else sum(dense)
            dw = add(dw, product.from_positions(forms.positions), share)
    return forward, dx, dw, recomputed, pairs


def pairs_in_dx(op: Operation, forms: Forms) -> float:
    """What pairs add to the gradient of the operation's input, as a share of it."""
    return pairs_beside(op, forms.carried) + sum(pair.inputs for pair in op.pairs if pair.component in forms.paired)


def pairs_beside(op: Operation, components: frozenset[int]) -> float:
    """What the pairs of these components add to the operation, as a share of it."""
    return sum(pair.total for pair in op.pairs if pair.component in components)
