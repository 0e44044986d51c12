"""Linear layers whose weight is split: one product forward, dW only for active slices.

`nn.Linear` keeps W as [O, I] and computes x Wᵀ + b; GPT-2's `Conv1D` keeps it as [I, O] and computes x W + b. A slice
along O (a head's rows of q/k/v) needs its columns of dY and all of X; a slice along I (a head's columns of the output
projection) its columns of X and all of dY. Neighbouring active slices are one product, so with all of them active dW
is the plain module's, bit for bit.

Shapes: N rows (all leading dimensions folded), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rgft.execution.convolution import Kernel, kernel_of
from rgft.execution.runs import Run, runs_of, split, without_autocast
from rgft.execution.split_weight import SplitWeight

#: Where a module keeps what draws the rows of its dW (`Draw`); not an attribute that any module has.
DRAW = "_rgft_draw"


class Draw(Protocol):
    """What draws the rows that dW is made from; see `sampled_rows`."""

    def applies(self, module: nn.Module, x: Tensor) -> bool:
        """Whether a call's dW is made from a sample."""
        ...

    def draw(self, x_NI: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of rows, and how often each counts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a linear module keeps its weight.

    Attributes:
        output_dim: dimension of the weight that holds the outputs: 0 for [O, I], 1 for [I, O].
    """

    output_dim: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the plain module computes while its weight is trained, to the last bit."""
        if self.output_dim == 1:
            assert bias is not None
            return torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.shape[1])
        if x.dim() < 3 or x.is_contiguous():
            return F.linear(x, weight, bias)
        # For such inputs torch takes another path, with other last bits, unless the weight requires a gradient.
        with torch.enable_grad():
            trained = weight.detach().requires_grad_().view_as(weight)  # no leaf: autocast would cache its cast
            return F.linear(x.detach(), trained, bias).detach()

    def dx(self, dy_NO: Tensor, weight: Tensor) -> Tensor:
        return dy_NO @ (weight if self.output_dim == 0 else weight.t())

    def dw(self, dy: Tensor, x: Tensor) -> Tensor:
        return dy.t() @ x if self.output_dim == 0 else x.t() @ dy

    def slices(self, dim: int) -> bool:
        """Whether dW can be made for active slices along `dim` alone."""
        return True

    def sliced(
        self, module: nn.Module, x: Tensor, weight: SplitWeight, bias: SplitWeight | nn.Parameter | None
    ) -> Tensor:
        """The forward of `module`, see `sliced_linear`."""
        draw: Draw | None = module.__dict__.get(DRAW)
        return sliced_linear(x, self, weight, bias, draw if draw is not None and draw.applies(module, x) else None)


ROWS_OUT = Layout(output_dim=0)
ROWS_IN = Layout(output_dim=1)


def layout_of(module: nn.Module) -> Layout | Kernel | None:
    """How a module keeps its weight whose dW can be made for active slices alone; None for any other module.

    Known are modules whose forward is that of `nn.Linear`, of a convolution, or of `Conv1D` (transformers), which is
    known by its structure: the name of its forward, `nf`, and weight [I, nf] with a bias.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return ROWS_OUT
    if (kernel := kernel_of(module)) is not None:
        return kernel
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    is_conv1d = (
        getattr(forward, "__qualname__", "") == "Conv1D.forward"
        and isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.dim() == 2
        and bias.shape == (getattr(module, "nf", None),) == weight.shape[1:]
    )
    return ROWS_IN if is_conv1d else None


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What a call of the function is about: everything that is not a tensor with a gradient.

    Attributes:
        weight_dim: dimension that the weight's slices divide.
        weight_runs: active slices of the weight.
        bias_runs: active slices of the bias; None for a bias that is whole (then it is the last argument, or absent).
        has_whole_bias: whether the last argument is a whole bias that requires a gradient.
        draw: what draws the rows of dW; None: it is made from all.
    """

    layout: Layout
    weight_dim: int
    weight_runs: tuple[Run, ...]
    bias_runs: tuple[Run, ...]
    has_whole_bias: bool
    draw: Draw | None = None

    @property
    def slices_inputs(self) -> bool:
        return self.weight_dim != self.layout.output_dim


class _SlicedLinear(torch.autograd.Function):
    """x, fused weight, fused bias, spec, then the active parameters: weight views, bias views or a whole bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: _Spec, *active: Tensor) -> Tensor:
        y = spec.layout.forward(x, weight, bias)
        # Under autocast y has the product's dtype; saving x in it saves memory and repeats what autograd would do.
        saved = _inputs_to_save(x.reshape(-1, x.shape[-1]), y.dtype, spec)
        ctx.save_for_backward(weight, *saved)
        ctx.spec, ctx.x_shape, ctx.x_dtype, ctx.compute_dtype = spec, x.shape, x.dtype, y.dtype
        ctx.dtypes = tuple(parameter.dtype for parameter in active)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        spec: _Spec = ctx.spec
        weight, *saved = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dx = None
        with without_autocast(dy.device.type):
            if ctx.needs_input_grad[0]:
                dx = spec.layout.dx(dy_NO, weight.to(ctx.compute_dtype)).view(ctx.x_shape).to(ctx.x_dtype)
            gradients = [*_weight_gradients(dy_NO, saved, spec), *_bias_gradients(dy_NO, spec)]
        cast = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return dx, None, None, None, *cast


def _inputs_to_save(x_NI: Tensor, dtype: torch.dtype, spec: _Spec) -> list[Tensor]:
    """What dW needs of X: nothing, everything, or copies of the active columns (a view would keep all of it alive)."""
    if not spec.weight_runs:
        return []
    is_full = len(spec.weight_runs) == 1 and spec.weight_runs[0].stop - spec.weight_runs[0].start == x_NI.shape[1]
    if not spec.slices_inputs or is_full:
        return [x_NI.to(dtype)]
    return [x_NI[:, run.start : run.stop].to(dtype).contiguous() for run in spec.weight_runs]


def _weight_gradients(dy_NO: Tensor, saved: Sequence[Tensor], spec: _Spec) -> list[Tensor]:
    if spec.draw is not None and saved:
        # Of a weight whose inputs are sliced the slices' columns are what is there, and all that matters.
        x_NI = saved[0] if len(saved) == 1 else torch.cat(list(saved), dim=1)
        rows, factors = spec.draw.draw(x_NI, dy_NO)
        dy_NO = dy_NO[rows] * factors.to(dy_NO.dtype)[:, None]
        saved = [x[rows] for x in saved]
    gradients = []
    for index, run in enumerate(spec.weight_runs):
        if spec.slices_inputs:
            product = spec.layout.dw(dy_NO, saved[index])
        else:
            product = spec.layout.dw(dy_NO[:, run.start : run.stop], saved[0])
        gradients.extend(split(product, spec.weight_dim, run))
    return gradients


def _bias_gradients(dy_NO: Tensor, spec: _Spec) -> list[Tensor]:
    if spec.has_whole_bias:
        return [dy_NO.sum(0)]
    return [part for run in spec.bias_runs for part in split(dy_NO[:, run.start : run.stop].sum(0), 0, run)]


def sliced_linear(
    x: Tensor, layout: Layout, weight: SplitWeight, bias: SplitWeight | nn.Parameter | Tensor | None,
    draw: Draw | None = None,
) -> Tensor:  # fmt: skip
    """The linear map of a module whose weight is split.

    Args:
        x: [..., I].
        layout: of the weight.
        weight: the split weight.
        bias: split, whole, or absent.
        draw: what draws the rows of dW; None: it is made from all.

    Returns:
        [..., O], bit-identical to the plain module's.
    """
    active_weight = weight.active() if torch.is_grad_enabled() else []
    active_bias = bias.active() if isinstance(bias, SplitWeight) and torch.is_grad_enabled() else []
    fused_bias = bias.data if isinstance(bias, SplitWeight) else bias
    if not active_weight and not active_bias:
        # Autograd itself does this case well: dX from the frozen weight, db of a whole bias, nothing saved of x.
        if layout.output_dim == 0:
            return F.linear(x, weight.data, fused_bias)
        return layout.forward(x, weight.data, fused_bias)
    has_whole_bias = isinstance(fused_bias, Tensor) and not isinstance(bias, SplitWeight) and fused_bias.requires_grad
    spec = _Spec(
        layout=layout,
        weight_dim=weight.dim,
        weight_runs=runs_of(active_weight),
        bias_runs=runs_of(active_bias),
        has_whole_bias=has_whole_bias,
        draw=draw,
    )
    parameters = [view for _, view in active_weight] + [view for _, view in active_bias]
    if has_whole_bias:
        assert fused_bias is not None
        parameters.append(fused_bias)  # type: ignore[arg-type]
    detached_bias = None if fused_bias is None else fused_bias.detach()
    return _SlicedLinear.apply(x, weight.data, detached_bias, spec, *parameters)  # type: ignore[no-any-return]


def sampled_linear(x: Tensor, layout: Layout, weight: nn.Parameter, bias: nn.Parameter | None, draw: Draw) -> Tensor:
    """The linear map of a module whose weight is whole, dW from a sample of its rows.

    Args:
        x: [..., I].
        layout: of the weight.
        weight: requires a gradient.
        bias: or None.
        draw: what draws the rows.

    Returns:
        [..., O], bit-identical to the plain module's.
    """
    outputs = weight.shape[layout.output_dim]
    has_bias = bias is not None and bias.requires_grad
    spec = _Spec(
        layout=layout,
        weight_dim=layout.output_dim,
        weight_runs=(Run(start=0, stop=outputs, members=((0, outputs),)),),
        bias_runs=(),
        has_whole_bias=has_bias,
        draw=draw,
    )
    parameters = [weight, bias] if has_bias else [weight]
    detached_bias = None if bias is None else bias.detach()
    return _SlicedLinear.apply(x, weight.detach(), detached_bias, spec, *parameters)  # type: ignore[no-any-return]
