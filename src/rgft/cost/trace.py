"""Making a cost model: a few small forward passes of the real model, read and fitted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.cost.batch_shape import BatchShape
from rgft.cost.counting import flop_counter
from rgft.cost.graph import MaskedAttention, WeightInfo, read_operations
from rgft.cost.loss import Loss, model_loss
from rgft.cost.model import CostModel
from rgft.cost.operations import Coefficients, Operation, PairShare, Product
from rgft.cost.undisturbed import undisturbed
from rgft.errors import ConfigError, PartitionError, RGFTError

log = logging.getLogger("rgft")

#: How far the modelled forward pass may be from the counted one.
TOLERANCE = 0.02
#: One would break batch normalisation in training mode. A trace of one row more tells what is made once a pass.
TRACE_ROWS = 2
#: What a forward pass raises that cannot take its batch.
_OF_FORWARD = (IndexError, RuntimeError, TypeError, ValueError)
#: Kind of the work that left no trace in the graph.
OUTSIDE = "outside the graph"


def trace_costs(
    model: nn.Module, partition: Partition, batch: Any, loss: Loss | None = None, *, elementwise: Collection[str] = (),
    is_sliceable: Callable[[nn.Module], bool] = lambda module: True, pairs: LowRankShapes | None = None,
    without_dropout: Callable[[], AbstractContextManager[None]] | None = None, drawn: Collection[str] = (),
) -> CostModel:  # fmt: skip
    """Reads a model's costs off its autograd graph.

    Runs the model forward, on two rows of `batch` and three token counts and once on three rows, in training mode (also
    without dropout) and in eval mode, and leaves it as it was: RNG, buffers, modes, `requires_grad` flags; no gradient
    is made. FLOPs of any other batch follow exactly, being rows × a polynomial of degree two in the token count, or, of
    work on weights alone (an adapter's orthogonal matrix, the norms that DoRA finds outside the graph), the same for
    any number of rows. Of a model that takes one token count alone, costs are known at that one.

    What counts: matrix products, convolutions, attention, as `FlopCounterMode` counts them (see `rgft.cost.counting`
    for where that departs from the work done). With an encoder and a decoder, `tokens` is the encoder's length, and
    the decoder's (labels) grows with it in the proportion of `batch`. Parameters of no component that need no
    gradient (PEFT's base weights) cost F and dX, never dW. Recomputation by gradient checkpointing is not modelled:
    it is switched off in the trace where modules have a `gradient_checkpointing` flag.

    Args:
        model: plain: before attaching, wrapping (DDP) or compiling.
        partition: its components.
        batch: an example of the run's batches; a mapping, tuple or tensor. Its first tensor or `input_ids` tells rows
            and tokens; a batch without 2-D token ids has no token dimension.
        loss: (model, batch) → scalar; by default `model(**batch).loss`.
        elementwise: names (`…Backward`) of custom autograd functions that hold no matrix product.
        is_sliceable: whether a module's dW is made for its active slices alone (of kernels, which have more than two
            dimensions, for slices along the first); of any other it is made whole.
        pairs: low-rank pairs that components may be trained by; None: there are none. The model itself has none.
        without_dropout: inside, the model drops nothing at random; None: no step is made so.
        drawn: paths of the modules whose dW may be made from a sample of the positions.

    Raises:
        PartitionError: a trainable parameter belongs to no component, or a component's parameter is not there.
        RGFTError: quantised weights, work that cannot be read off the graph, products that change with the batch, or
            a modelled forward pass more than 2 % away from the counted one.
    """
    weights = _weights(model, partition, is_sliceable, pairs, drawn)
    run = _Run(model, partition, weights, loss or model_loss, elementwise, example=batch)
    with undisturbed(model):
        shapes, fixed_tokens = run.shapes, None
        try:
            training, dropless, probing = run.read(shapes, without_dropout)
        except _OneLengthOnly as refused:
            log.info("costs: %s", refused)
            fixed_tokens = shapes[0].tokens
            alone = replace(shapes[0], tokens=None, targets=None)
            training, dropless, probing = run.read([alone], without_dropout)
    return CostModel(
        names=partition.names, depths=tuple(c.depth for c in partition), training=training, probing=probing,
        dropless=dropless, fixed_tokens=fixed_tokens,
        low_rank=frozenset() if pairs is None else pairs.components,
        freezes_others=pairs is not None and pairs.freezes_others,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LowRankShapes:
    """Low-rank pairs that components may be trained by.

    Attributes:
        sizes: parameter → (component, inputs, outputs) of each slice of it that may have a pair.
        rank: of all pairs.
        freezes_others: whether nothing else of such a component is trained then.
    """

    sizes: Mapping[str, Sequence[tuple[str, int, int]]]
    rank: int
    freezes_others: bool = False

    @property
    def components(self) -> frozenset[str]:
        return frozenset(name for found in self.sizes.values() for name, _, _ in found)

    def of(self, parameter: str, numel: int, indices: Mapping[str, int]) -> tuple[PairShare, ...]:
        """Those beside a parameter, as shares of its product's FLOPs."""
        return tuple(
            PairShare(component=indices[name], inputs=self.rank * i / numel, outputs=self.rank * o / numel)
            for name, i, o in self.sizes.get(parameter, ())
        )


class _OneLengthOnly(Exception):
    """The model takes the example batch, and not one of another length made from it."""


class _Run:
    """One model, traced or counted on batches of several shapes, all made from an example."""

    def __init__(
        self, model: nn.Module, partition: Partition, weights: Mapping[int, WeightInfo], loss: Loss,
        elementwise: Collection[str], example: Any,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.weights, self.elementwise = model, loss, weights, elementwise
        self.example = example
        self.components = partition.components
        self.after_layers = len(partition.layers) + 1
        self._shape = BatchShape.of(example)

    @property
    def shapes(self) -> list[BatchShape]:
        """Of few rows, and of one or four lengths: three to fit, the fourth to check the fit."""
        small = replace(self._shape, rows=min(self._shape.rows, TRACE_ROWS))
        return [small.scaled(parts) for parts in _lengths(small)]

    def read(
        self, shapes: Sequence[BatchShape], without_dropout: Callable[[], AbstractContextManager[None]] | None
    ) -> tuple[tuple[Operation, ...], ...]:
        """Operations of training steps, of these without dropout (none: never asked for), and in eval mode."""
        dropless: tuple[Operation, ...] = ()
        self.model.train()
        training = self.operations(shapes[:3])
        if without_dropout is not None:
            with without_dropout():
                dropless = self.operations(shapes[:3])
        self.model.eval()
        probing = self.operations(shapes[:3])
        for held_out in shapes[3:]:
            modelled = sum(op.evaluate(op.flops, held_out.rows, held_out.tokens or 1) for op in probing)
            _compare(modelled, self.count(held_out), held_out)
        return training, dropless, probing

    def operations(self, shapes: Sequence[BatchShape]) -> tuple[Operation, ...]:
        """Operations in the mode that the model is in, their FLOPs fitted to batches of these shapes."""
        traces = [self.trace(shape) for shape in shapes]
        once = (False,) * len(traces[-1])  # of one row that is the same, and products of one may be others
        if shapes[-1].rows == TRACE_ROWS:
            more = replace(shapes[-1], rows=TRACE_ROWS + 1)
            once = _made_once((traces[-1], self.trace(more)), (shapes[-1], more))
        fitted = _fit(traces, shapes, once)
        _check_outside(fitted, shapes[0])
        return fitted

    def trace(self, shape: BatchShape) -> list[Operation]:
        """Operations on one batch, FLOPs of the whole batch; the last is what runs outside the graph."""
        attention, counter = MaskedAttention(), flop_counter()
        with torch.enable_grad(), counter, attention:
            loss = self._forward(shape)
        operations = read_operations(
            loss, self.weights, self.components, after_layers=self.after_layers, rows=shape.rows, attention=attention,
            elementwise=self.elementwise,
        )  # fmt: skip
        modelled, counted = sum(op.flops[0] for op in operations), counter.get_total_flops()
        if modelled > counted:
            _compare(modelled, counted, shape)
        outside = Operation(
            kind=OUTSIDE, depth=self.after_layers, flops=(max(0.0, counted - modelled), 0.0, 0.0), products=()
        )
        return [*operations, outside]

    def count(self, shape: BatchShape) -> float:
        counter = flop_counter()
        # With gradients enabled: without, some modules switch to inference kernels that are not counted.
        with torch.enable_grad(), counter:
            self._forward(shape)
        return counter.get_total_flops()

    def _forward(self, shape: BatchShape) -> Tensor:
        try:
            return self._loss_of(self._shape.resize(self.example, shape))
        except RGFTError:
            raise
        except _OF_FORWARD as error:
            at = f"{shape.rows} rows × {shape.tokens or self._shape.tokens or 1} tokens"
            self._require(self._shape, "the example batch as it is")
            if shape.tokens not in (None, self._shape.tokens):
                rows = replace(self._shape, rows=shape.rows)
                self._require(rows, "made from the example batch")
                raise _OneLengthOnly(f"known at {rows.tokens} tokens alone, for at {at}: {_told(error)}") from error
            raise RGFTError(f"the forward pass failed on {at} made from the example batch: {_told(error)}") from error

    def _require(self, shape: BatchShape, what: str) -> None:
        """Raises RGFTError where the example batch fails in this shape: then its length is not the cause."""
        try:
            self._loss_of(self._shape.resize(self.example, shape))
        except _OF_FORWARD as error:
            raise RGFTError(
                f"the forward pass failed on {shape.rows} rows × {shape.tokens or 1} tokens, {what}: {_told(error)}; "
                "give a batch that model and loss take (its inputs, its labels)"
            ) from error

    def _loss_of(self, batch: Any) -> Tensor:
        loss = self.loss(self.model, batch)
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"loss: expected a tensor, found {type(loss).__name__}; models return none for a batch without labels"
            )
        return loss


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _compare(modelled: float, counted: float, shape: BatchShape) -> None:
    if abs(modelled - counted) > TOLERANCE * counted:
        raise RGFTError(
            f"the modelled forward pass has {modelled:.6g} FLOPs, FlopCounterMode counts {counted:.6g} "
            f"({modelled - counted:+.6g}) on {shape.rows} rows × {shape.tokens or 1} tokens; expected them within "
            f"{TOLERANCE:.0%}: the model does work that leaves no trace in its autograd graph, or that is no "
            "polynomial of degree two in the token count"
        )


def _lengths(shape: BatchShape) -> list[int]:
    """Multiples of the shape's unit to trace at: three to fit, the fourth to check the fit; one without tokens."""
    if shape.tokens is None:
        return [1]
    whole = shape.unit
    parts = [whole, -(-whole // 2), -(-whole // 4), -(-whole * 3 // 4)]
    # A single token takes other paths (decoding); too coarse a unit means going up instead, by repeating the batch.
    if len(set(parts)) < 4 or shape.scaled(parts[2]).tokens == 1 or shape.scaled(parts[2]).targets == 1:
        return [whole, whole + 1, whole + 2, whole + 3]
    return parts


def _made_once(traces: Sequence[Sequence[Operation]], shapes: tuple[BatchShape, BatchShape]) -> tuple[bool, ...]:
    """Which operations cost the same with more rows, of traces at two numbers of rows.

    Raises:
        RGFTError: too much costs neither the same nor as much per row.
    """
    few, many = traces
    if [_pattern(op) for op in few] != [_pattern(op) for op in many]:
        raise RGFTError(
            f"the model's operations depend on the number of rows: {len(few)} at {shapes[0].rows}, {len(many)} at "
            f"{shapes[1].rows}"
        )
    once = tuple(left.flops == right.flops and left.flops[0] > 0.0 for left, right in zip(few, many, strict=True))
    scale = shapes[1].rows / shapes[0].rows
    modelled = sum(op.flops[0] * (1.0 if is_once else scale) for op, is_once in zip(few, once, strict=True))
    _compare(modelled, sum(op.flops[0] for op in many), shapes[1])
    return once


def _check_outside(operations: Sequence[Operation], shape: BatchShape) -> None:
    """What leaves no trace in the graph is known well if it is the same for all batches; else there may be little."""
    flops = [op.evaluate(op.flops, shape.rows, shape.tokens or 1) for op in operations]
    lost = [
        value for op, value in zip(operations, flops, strict=True)
        if op.kind == OUTSIDE and not (op.once and op.flops[1:] == (0.0, 0.0))
    ]  # fmt: skip
    _compare(sum(flops) - sum(lost), sum(flops), shape)


def _fit(
    traces: Sequence[Sequence[Operation]], shapes: Sequence[BatchShape], once: Sequence[bool]
) -> tuple[Operation, ...]:
    """One list of operations whose FLOPs are polynomials, from lists at several token counts.

    Args:
        traces, shapes: of the batches.
        once: whether an operation is made once a pass.
    """
    first = [_pattern(op) for op in traces[0]]
    for trace, shape in zip(traces, shapes, strict=True):
        pattern = [_pattern(op) for op in trace]
        if pattern != first:
            at = next((i for i, (a, b) in enumerate(zip(first, pattern, strict=False)) if a != b), None)
            where = "their number" if at is None else f"operation {at} ({traces[0][at].kind}, {trace[at].kind})"
            raise RGFTError(
                f"the model's operations depend on the batch: {len(first)} at {shapes[0].tokens} tokens, "
                f"{len(pattern)} at {shape.tokens}; they differ in {where}; for a mixture of experts use an "
                "implementation that runs all experts in one product (grouped_mm)"
            )
    fitted: list[Operation] = []
    singles = [replace(shape, rows=1) for shape in shapes]
    for is_once, *versions in zip(once, *traces, strict=True):
        at = singles if is_once else shapes
        products = tuple(
            _refit(products, at) for products in zip(*(version.products for version in versions), strict=True)
        )
        fused = tuple(version.fused for version in versions if version.fused is not None)
        flops = _polynomial([version.flops[0] for version in versions], at)
        alternative = _refit(fused, at) if fused else None
        fitted.append(replace(versions[0], flops=flops, products=products, fused=alternative, once=is_once))
    return tuple(op for op in fitted if any(op.flops))


def _pattern(op: Operation) -> tuple[Any, ...]:
    products = tuple((product.upstream, product.shares) for product in op.products)
    return op.kind, op.depth, op.owners, op.mask, op.fused is None, products


def _refit(versions: Sequence[Product], shapes: Sequence[BatchShape]) -> Product:
    return replace(versions[0], flops=_polynomial([v.flops[0] for v in versions], shapes))


def _polynomial(flops: Sequence[float], shapes: Sequence[BatchShape]) -> Coefficients:
    """Exact FLOPs per row through one or three points (Newton's divided differences)."""
    values = [Fraction(value) / shape.rows for value, shape in zip(flops, shapes, strict=True)]
    if len(values) == 1:
        return float(values[0]), 0.0, 0.0
    x = [Fraction(shape.tokens or 0) for shape in shapes]
    slope = (values[1] - values[0]) / (x[1] - x[0])
    bend = ((values[2] - values[1]) / (x[2] - x[1]) - slope) / (x[2] - x[0])
    return (
        float(values[0] - slope * x[0] + bend * x[0] * x[1]),
        float(slope - bend * (x[0] + x[1])),
        float(bend),
    )


def _weights(
    model: nn.Module, partition: Partition, is_sliceable: Callable[[nn.Module], bool], pairs: LowRankShapes | None,
    drawn: Collection[str],
) -> dict[int, WeightInfo]:  # fmt: skip
    """What the graph walk needs to know of each parameter; all problems are reported together."""
    owners: dict[str, dict[int, float]] = {}
    across: set[str] = set()
    for index, component in enumerate(partition):
        for part in component.slices:
            shares = owners.setdefault(part.parameter, {})
            shares[index] = shares.get(index, 0.0) + part.fraction
            if part.dim and len(part.shape) > 2:
                across.add(part.parameter)
    named = dict(model.named_parameters())
    problems = [f"{name!r} is in the partition, not in the model" for name in owners if name not in named]
    problems += [
        f"{name!r} is trainable and in no component"
        for name, parameter in named.items()
        if parameter.requires_grad and name not in owners
    ]  # fmt: skip
    if problems:
        raise PartitionError("partition and model do not fit:\n  " + "\n  ".join(problems))
    quantised = [name for name, p in named.items() if not p.is_floating_point() and not p.is_complex()]
    if quantised:
        raise RGFTError(
            f"expected floating-point weights; found quantised ones ({quantised[0]!r} of dtype "
            f"{named[quantised[0]].dtype}, {len(quantised)} in all), whose products leave no readable node; trace the "
            "same architecture unquantised: its FLOPs are the same"
        )
    weights: dict[int, WeightInfo] = {}
    indices = {component.name: index for index, component in enumerate(partition)}
    freezing = {indices[n] for n in pairs.components} if pairs is not None and pairs.freezes_others else set()
    for name, parameter in named.items():
        beside = () if pairs is None else pairs.of(name, parameter.numel(), indices)
        mine = owners.get(name, {})
        layer = next((i for i, path in enumerate(partition.layers) if name.startswith(f"{path}.")), None)
        known = [partition.components[index].depth for index in mine]
        weights[id(parameter)] = WeightInfo(
            owners=tuple(mine.items()), pairs=beside,
            mask=sum(1 << index + len(indices) * (index in freezing and not beside) for index in mine),
            depth=max(known) if known else (0 if layer is None else layer + 1), in_layer=layer is not None,
            is_sliceable=name not in across and is_sliceable(model.get_submodule(name.rpartition(".")[0])),
            drawn=parameter.numel() if name.removesuffix(".weight") in drawn else 0,
        )  # fmt: skip
    return weights
