"""What a step is made of: products, with their FLOPs and what has to be on for them to be made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

#: FLOPs per row as a polynomial in the token count T: (a, b, c) stands for a + b·T + c·T².
Coefficients = tuple[float, float, float]


def add(left: Coefficients, right: Coefficients, scale: float = 1.0) -> Coefficients:
    """Left + scale × right."""
    return (left[0] + scale * right[0], left[1] + scale * right[1], left[2] + scale * right[2])


def evaluate(coefficients: Coefficients, rows: int, tokens: int) -> float:
    """FLOPs of a batch."""
    a, b, c = coefficients
    return rows * (a + tokens * (b + tokens * c))


@dataclass(frozen=True, kw_only=True)
class Product:
    """One gradient product of an operation.

    Attributes:
        flops: per row.
        upstream: bit mask over the components; the product is needed iff one of them is active.
        shares: for a product into a weight, (component index, fraction of the weight it owns); None: dX.
        is_whole: made for the whole weight as soon as one owner is active.
        is_drawn: into a weight, made in training steps from a sample of the positions, if the run samples any.
    """

    flops: Coefficients
    upstream: int
    shares: tuple[tuple[int, float], ...] | None = None
    is_whole: bool = False
    is_drawn: bool = False

    def from_positions(self, share: float) -> Coefficients:
        """FLOPs where it is made from a share of the positions."""
        return add((0.0, 0.0, 0.0), self.flops, share) if self.is_drawn else self.flops

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Product:
        """Of what `dataclasses.asdict` made."""
        shares = data["shares"]
        return cls(
            flops=_coefficients(data["flops"]), upstream=data["upstream"],
            shares=None if shares is None else tuple((int(i), float(f)) for i, f in shares),
            is_whole=data["is_whole"], is_drawn=data.get("is_drawn", False),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PairShare:
    """A low-rank pair beside the weight of an operation: what x Aᵀ and (x Aᵀ) Bᵀ cost.

    Attributes:
        component: its index.
        inputs, outputs: FLOPs of the two products, as shares of the operation's.
    """

    component: int
    inputs: float
    outputs: float

    @property
    def total(self) -> float:
        return self.inputs + self.outputs


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One matrix product, convolution or attention core of the forward pass.

    Attributes:
        kind: name of its autograd node.
        depth: of the layer it runs in, as in `Partition`.
        flops: forward, per row.
        products: its gradient products.
        owners: (component index, fraction), by which reports attribute it; what is missing to 1 is frozen.
        fused: attention that runs unfused only because its mask needs a gradient: the product in place of `products`
            when no component of `mask` is active.
        mask: bit mask of the components upstream of that mask.
        at_targets: made only where the loss has a target (a language model's head), in steps that skip the rest.
        pairs: that components may have beside its weight.
        once: made once a pass however many rows there are: work on weights alone (an adapter's orthogonal matrix, the
            norms of merged weights). All FLOPs here and in `products` are then those of the pass.
    """

    kind: str
    depth: int
    flops: Coefficients
    products: tuple[Product, ...]
    owners: tuple[tuple[int, float], ...] = ()
    fused: Product | None = None
    mask: int = 0
    at_targets: bool = False
    pairs: tuple[PairShare, ...] = ()
    once: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Operation:
        """Of what `dataclasses.asdict` made."""
        return cls(
            kind=data["kind"], depth=data["depth"], flops=_coefficients(data["flops"]),
            products=tuple(Product.from_dict(product) for product in data["products"]),
            owners=tuple((int(i), float(f)) for i, f in data["owners"]),
            fused=None if data["fused"] is None else Product.from_dict(data["fused"]), mask=data["mask"],
            at_targets=data["at_targets"], pairs=tuple(PairShare(**pair) for pair in data.get("pairs", ())),
            once=data.get("once", False),
        )  # fmt: skip

    def evaluate(self, coefficients: Coefficients, rows: int, tokens: int) -> float:
        """FLOPs of a batch, of what is the operation's."""
        return evaluate(coefficients, 1 if self.once else rows, tokens)

    def products_for(self, active: int) -> tuple[Product, ...]:
        return self.products if self.fused is None or active & self.mask else (self.fused,)


def _coefficients(values: Collection[float]) -> Coefficients:
    a, b, c = values
    return float(a), float(b), float(c)
