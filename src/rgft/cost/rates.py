"""Rates of this machine: measured once on products, elementwise work and the optimizer, never on what they predict."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.architectures.matrices import has_matrix, matrix_size
from rgft.cost.elements import Elements, count_elements
from rgft.optimizer import KINDS, Kind

#: Rows, inputs and outputs of a linear layer's product.
Shape = tuple[int, int, int]
#: Products that are timed where no model says which → their share of the work.
SHAPES: Mapping[Shape, float] = {(1024, 384, 384): 1.0, (1024, 384, 1536): 4.0, (1024, 1536, 384): 4.0}
#: Shapes of a model that are timed at most; the others are like them.
MOST_SHAPES = 4
#: More rows, inputs or outputs than these make products no faster.
MOST_ROWS, MOST_WIDTH = 4096, 16384
#: How often each is timed.
REPEATS = 15
#: Bytes of operands that are gone through before one is used again; more than the caches of a machine.
OPERANDS = 256 << 20
#: Rows and columns of the weights that the optimizer is timed on.
MATRIX = 1024
#: Elements of the largest tensor that is timed by itself: well above `FRESH_BYTES`.
LARGE = 32 << 20
#: Tensors that elementwise work is timed on at once, as many as no cache holds with what backward needs of them.
KEPT = 6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        product_flops: of matrix products, forward and both gradients of a linear layer.
        optimizer_elements: parameters that the optimizer updates (AdamW: in one kernel).
        written_elements: elements that other work writes (`rgft.cost.elements`).
        drawn_elements: random numbers that dropout draws.
        fresh_elements: elements of large tensors that are written, in memory that the system hands out anew.
    """

    product_flops: float
    optimizer_elements: float
    written_elements: float
    drawn_elements: float
    fresh_elements: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def seconds(self, flops: float, *, updated: float, elements: Elements) -> float:
        """Predicted seconds of a step of so many FLOPs that updates so many parameters, beside other work."""
        return (
            flops / self.product_flops + updated / self.optimizer_elements + elements.written / self.written_elements
            + elements.drawn / self.drawn_elements + elements.fresh / self.fresh_elements
        )  # fmt: skip


def measure_products(device: torch.device, dtype: torch.dtype, shapes: Mapping[Shape, float] = SHAPES) -> float:
    """FLOPs per second of matrix products, forward and both gradients of linear layers.

    Args:
        device, dtype: of the operands.
        shapes: → share of all FLOPs that are made in that shape.
    """
    seconds = 0.0
    for (rows, inputs, outputs), share in shapes.items():
        sets = _copies(rows * (inputs + outputs) + inputs * outputs, dtype)
        x, dy, w = (
            cycle([torch.randn(*shape, device=device, dtype=dtype) for _ in range(sets)])
            for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
        )
        y, dx, dw = (torch.empty_like(next(like)) for like in (dy, x, w))
        products = (
            lambda x=x, w=w, y=y: torch.mm(next(x), next(w).t(), out=y),
            lambda dy=dy, w=w, dx=dx: torch.mm(next(dy), next(w), out=dx),
            lambda dy=dy, x=x, dw=dw: torch.mm(next(dy).t(), next(x), out=dw),
        )
        seconds += share * sum(timed(product, device) for product in products) / (6.0 * rows * inputs * outputs)
    return sum(shapes.values()) / seconds


def measure_rates(
    device: torch.device, dtype: torch.dtype, shapes: Mapping[Shape, float] = SHAPES, *,
    optimizer: Kind = KINDS["adamw"],
) -> Rates:  # fmt: skip
    """Times products of linear layers, elementwise work, random numbers and an optimizer's steps.

    Of Muon it is the steps that are AdamW's; its products are FLOPs.
    """
    products = measure_products(device, dtype, shapes)
    rows, _, outputs = max(shapes, key=lambda shape: shapes[shape])
    kept = torch.ones(rows, outputs, device=device, dtype=dtype)
    return Rates(
        product_flops=products, optimizer_elements=_measure_optimizer(device, dtype, optimizer),
        written_elements=_measure_elementwise(device, dtype, rows, outputs),
        drawn_elements=kept.numel() / timed(lambda: kept.bernoulli_(0.9), device),
        fresh_elements=LARGE / timed(lambda: torch.ones(LARGE, device=device, dtype=dtype), device),
    )  # fmt: skip


def _measure_elementwise(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    """Elements written per second by what a transformer's layer does beside products, forward and backward."""
    tensors = [torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(KEPT)]
    norm = nn.LayerNorm(width, device=device, dtype=dtype)
    head = math.gcd(width, 64)

    def layer(x: Tensor) -> Tensor:
        heads = norm(x).view(rows, -1, head).transpose(0, 1).contiguous()
        weights = heads.softmax(-1).transpose(0, 1).reshape(rows, width)
        return (functional.gelu(weights) * 2.0 + x).sum()

    def work() -> None:
        # All forward first, as in a step: what backward reads is in no cache by then.
        torch.stack([layer(x) for x in tensors]).sum().backward()
        for x in tensors:
            x.grad = None
        norm.zero_grad()

    return count_elements(work).written / timed(work, device)


def product_shapes(model: nn.Module, run: Callable[[], object]) -> Mapping[Shape, float]:
    """Products that the model's linear layers and convolutions make in a pass: shape → FLOPs, those with most.

    Args:
        model: any; may be on the meta device.
        run: makes a forward pass, or a whole step.

    Returns:
        At most `MOST_SHAPES`; `SHAPES` where no such layer is reached.
    """
    flops: Counter[Shape] = Counter()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        inputs, outputs = matrix_size(module)
        rows = output.numel() // outputs
        shape = min(rows, MOST_ROWS), min(inputs, MOST_WIDTH), min(outputs, MOST_WIDTH)
        flops[shape] += 2 * rows * inputs * outputs

    handles = [module.register_forward_hook(note) for module in model.modules() if has_matrix(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {shape: float(made) for shape, made in flops.most_common(MOST_SHAPES)} or SHAPES


def _measure_optimizer(device: torch.device, dtype: torch.dtype, kind: Kind) -> float:
    """Parameters per second of the optimizer on many weights, as many as no cache holds."""
    weights = OPERANDS // (4 * MATRIX * MATRIX * dtype.itemsize) * (1 if device.type == "cpu" else 4)
    parameters = [nn.Parameter(torch.zeros(MATRIX, MATRIX, device=device, dtype=dtype)) for _ in range(weights)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = kind.build([{"params": parameters}], 1e-6)
    return weights * MATRIX * MATRIX / timed(optimizer.step, device)


def _copies(elements: int, dtype: torch.dtype) -> int:
    """How many sets of operands are taken in turn, so that none is still in a cache: nor is it in a step."""
    return max(2, -(-OPERANDS // (elements * dtype.itemsize)))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `work`, after two calls to warm up."""
    return median([seconds_of(work, device) for _ in range(REPEATS + 2)][2:])


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock of `work`, until the device has done it."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
