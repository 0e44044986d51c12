"""Which operations a step needs only where the loss has a target: seen by what they cost when one position is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rgft.cost.model import CostModel
from rgft.cost.operations import Coefficients, Operation, Product


def with_targets(costs: CostModel, one: CostModel) -> CostModel | None:
    """`costs`, in which training steps may make some operations at targets alone.

    Args:
        costs: of the loss at all positions.
        one: of a loss that reads one position of each row.

    Returns:
        Operations that cost the same at every length in `one`, and in `costs` as much per position, are those; all
        others must cost the same in both. None where this is not so, or where nothing could be spared.
    """
    training, dropless = _marked(costs.training, one.training), _marked(costs.dropless, one.dropless)
    if training is None or dropless is None or not any(op.at_targets for op in training):
        return None
    return replace(costs, training=training, dropless=dropless)


def _marked(all_positions: Sequence[Operation], one: Sequence[Operation]) -> tuple[Operation, ...] | None:
    if len(all_positions) != len(one):
        return None
    marked: list[Operation] = []
    for whole, narrow in zip(all_positions, one, strict=True):
        if _pattern(whole) != _pattern(narrow):
            return None
        if whole.flops == narrow.flops:
            marked.append(whole)
        elif _flops(whole) == [(0.0, each, 0.0) for each, *_ in _flops(narrow)] and _is_flat(narrow):
            marked.append(replace(whole, at_targets=True))
        else:
            return None
    return tuple(marked)


def _flops(op: Operation) -> list[Coefficients]:
    return [op.flops, *(product.flops for product in _products(op))]


def _is_flat(op: Operation) -> bool:
    return all(slope == bend == 0.0 for _, slope, bend in _flops(op))


def _products(op: Operation) -> Sequence[Product]:
    return op.products if op.fused is None else (*op.products, op.fused)


def _pattern(op: Operation) -> tuple[Any, ...]:
    products = tuple((product.upstream, product.shares, product.is_whole) for product in _products(op))
    return op.depth, op.owners, op.mask, op.fused is None, op.once, products
