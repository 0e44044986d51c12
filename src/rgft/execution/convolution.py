"""Convolutions whose weight is split along its output channels: one call forward, dW only for active slices.

A slice needs its channels of dY and, of X, the input channels of its groups. Neighbouring active slices are one
convolution-backward; with all of them active it is the plain module's own call, bit for bit. Slices need not be whole
groups: what they have of a group is a convolution without groups.

Shapes: X [N, I, *], dY [N, O, *], weight [O, I / groups, *kernel].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd

from rgft.execution.runs import Run, runs_of, split, without_autocast
from rgft.execution.split_weight import Range, SplitWeight

#: Of dX, dW and db: whether each is asked for, and what came.
_Wanted = tuple[bool, bool, bool]
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_CALLS: dict[type[_ConvNd], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A convolution's weight, [O, I / groups, *kernel].

    Attributes:
        plain: the module of torch whose forward it is used by.
    """

    plain: type[_ConvNd]

    def slices(self, dim: int) -> bool:
        """Whether dW can be made for active slices along `dim` alone."""
        return dim == 0

    def sliced(
        self, module: nn.Module, x: Tensor, weight: SplitWeight, bias: SplitWeight | nn.Parameter | None
    ) -> Tensor:
        """The forward of `module`, see `sliced_convolution`."""
        assert isinstance(module, _ConvNd)
        return sliced_convolution(x, module, _CALLS[self.plain], weight, bias)


def kernel_of(module: nn.Module) -> Kernel | None:
    """The kernel of a module whose forward is that of `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, else None."""
    kind: Any = type(module)
    for plain in _CALLS:
        own: Any = plain
        if isinstance(module, plain) and kind.forward is own.forward and kind._conv_forward is own._conv_forward:
            return Kernel(plain=plain)
    return None


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """What a call of the function is about: everything that is not a tensor with a gradient.

    Attributes:
        call: `F.conv1d`, `F.conv2d` or `F.conv3d`.
        weight_runs: active slices of the weight.
        bias_runs: active slices of the bias; a bias that is whole and requires a gradient is a run of one.
    """

    call: Callable[..., Tensor]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    weight_runs: tuple[Run, ...]
    bias_runs: tuple[Run, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.call(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, groups: int, *, wanted: _Wanted) -> _Gradients:
        """dX, dW and db, as far as `wanted`, of a convolution with these operands."""
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation, False, [0] * len(self.stride),
            groups, wanted,
        )  # fmt: skip


class _SlicedConvolution(torch.autograd.Function):
    """x, fused weight, fused bias, spec, then the active parameters: weight views, bias views or a whole bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: _Spec, *active: Tensor) -> Tensor:
        y = spec.forward(x, weight, bias)
        # Under autocast y has the product's dtype; saving x in it saves memory and repeats what autograd would do.
        ctx.save_for_backward(weight, x.to(y.dtype))
        ctx.spec, ctx.x_dtype = spec, x.dtype
        ctx.dtypes = tuple(parameter.dtype for parameter in active)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        weight, x = ctx.saved_tensors
        with without_autocast(dy.device.type):
            dx, gradients = _gradients(dy, x, weight.to(x.dtype), ctx.spec, needs_dx=ctx.needs_input_grad[0])
        cast = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None if dx is None else dx.to(ctx.x_dtype), None, None, None, *cast


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, spec: _Spec, *, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """dX, and the gradients of the active slices: of the weight, then of the bias."""
    if not _is_all(spec.weight_runs, weight.shape[0]):
        dx = spec.backward(dy, x, weight, spec.groups, wanted=(True, False, False))[0] if needs_dx else None
        products = [_weight_gradient(dy, x, weight, spec, run) for run in spec.weight_runs]
        sums = [_bias_gradient(dy, run) for run in spec.bias_runs]
    else:
        # The plain module's call: some kernels make db beside dW, with other last bits than a sum.
        wanted = (needs_dx, True, _is_all(spec.bias_runs, weight.shape[0]))
        dx, product, total = spec.backward(dy, x, weight, spec.groups, wanted=wanted)
        assert product is not None
        products = [product]
        sums = [_bias_gradient(dy, run) for run in spec.bias_runs] if total is None else [total]
    weights = [part for run, product in zip(spec.weight_runs, products, strict=True) for part in split(product, 0, run)]
    return dx, weights + [
        part for run, total in zip(spec.bias_runs, sums, strict=True) for part in split(total, 0, run)
    ]


def _is_all(runs: Sequence[Run], size: int) -> bool:
    return len(runs) == 1 and runs[0].stop - runs[0].start == size


def _bias_gradient(dy: Tensor, run: Run) -> Tensor:
    return dy[:, run.start : run.stop].sum((0, *range(2, dy.dim())))


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, spec: _Spec, run: Run) -> Tensor:
    """dW of the output channels of a run."""
    inputs, per_group = weight.shape[1], weight.shape[0] // spec.groups
    parts: list[Tensor] = []
    for start, stop in _pieces(run, per_group):
        groups = max(1, (stop - start) // per_group)
        x_part = x.narrow(1, start // per_group * inputs, groups * inputs)
        part = slice(start, stop)
        _, product, _ = spec.backward(dy[:, part], x_part, weight[part], groups, wanted=(False, True, False))
        assert product is not None
        parts.append(product)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(run: Run, per_group: int) -> list[Range]:
    """A run as whole groups, and what it has of the groups before and behind them."""
    first = min(run.stop, -(-run.start // per_group) * per_group)
    last = max(first, run.stop // per_group * per_group)
    pieces = ((run.start, first), (first, last), (last, run.stop))
    return [(start, stop) for start, stop in pieces if start < stop]


def sliced_convolution(
    x: Tensor, module: _ConvNd, call: Callable[..., Tensor], weight: SplitWeight,
    bias: SplitWeight | nn.Parameter | None,
) -> Tensor:  # fmt: skip
    """The convolution of a module whose weight is split along its output channels.

    Args:
        x: [N, I, *] or [I, *].
        module: tells stride, padding, dilation and groups.
        call: the functional form of the module's convolution.
        weight: the split weight.
        bias: split, whole, or absent.

    Returns:
        [N, O, *] or [O, *], bit-identical to the plain module's.
    """
    whole = bias.data if isinstance(bias, SplitWeight) else bias
    active_weight, active_bias = _active(weight), _active(bias)
    if not active_weight and (not active_bias or whole is bias):
        # Autograd itself does this case well: dX from the frozen weight, db of a whole bias.
        return module._conv_forward(x, weight.data, whole)  # type: ignore[operator]
    spec, x = _spec(x, module, call, runs_of(active_weight), runs_of(active_bias))
    is_single = x.dim() == weight.data.dim() - 1
    parameters = [parameter for _, parameter in (*active_weight, *active_bias)]
    y = _SlicedConvolution.apply(
        x.unsqueeze(0) if is_single else x, weight.data, None if whole is None else whole.detach(), spec, *parameters
    )  # fmt: skip
    return y.squeeze(0) if is_single else y  # type: ignore[no-any-return]


def _active(parameter: SplitWeight | nn.Parameter | None) -> list[tuple[Range, nn.Parameter]]:
    """The slices that want a gradient; of a whole parameter, the one that it is."""
    if parameter is None or not torch.is_grad_enabled():
        return []
    if isinstance(parameter, SplitWeight):
        return parameter.active()
    return [((0, parameter.shape[0]), parameter)] if parameter.requires_grad else []


def _spec(
    x: Tensor, module: _ConvNd, call: Callable[..., Tensor], weight_runs: tuple[Run, ...], bias_runs: tuple[Run, ...]
) -> tuple[_Spec, Tensor]:
    """The call's spec, and x with the padding that a convolution cannot add itself, as the plain module adds it."""
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = (
            F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode),
            (0,) * len(module.stride),
        )
    elif padding == "valid":
        padding = (0,) * len(module.stride)
    elif isinstance(padding, str):
        x, padding = _pad_to_same(x, module)
    spec = _Spec(
        call=call, stride=module.stride, padding=tuple(padding), dilation=module.dilation, groups=module.groups,
        weight_runs=weight_runs, bias_runs=bias_runs,
    )  # fmt: skip
    return spec, x


def _pad_to_same(x: Tensor, module: _ConvNd) -> tuple[Tensor, tuple[int, ...]]:
    """x with one more zero behind wherever padding='same' is odd, and the padding on either side that is left."""
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [pad for total in reversed(totals) for pad in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)
