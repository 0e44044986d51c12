"""Cross-entropy of a linear layer's outputs, a few positions at a time.

Of a language model's head neither the logits of a batch nor their gradient ever exist as a whole, which are vocabulary
size × positions, several times over. What backward needs of a chunk's logits is taken while they are there: its rows of
dX, and its part of dW as it is if all positions weigh alike (the fused linear cross-entropy of Liger Kernel, Hsu et al.
2024, arXiv:2410.10989). So the products are those of the plain loss, and none is made twice.

Positions may weigh differently where their weights are told beforehand. Weights that only backward brings are right all
the same: dX is weighed there, and dW is computed again, for another F and dW.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

#: Logits that exist at a time: 128 MiB in fp32. Fewer positions would make products too small to be fast.
CHUNK_ELEMENTS = 2**25
MIN_POSITIONS = 64


def chunked_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *, positions: int | None = None,
    factors_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """−log softmax(hidden · weightᵀ + bias)[target] of each position [N], times its factor, at least in fp32.

    Under autocast the products are made in its type, as a linear layer's are; dW is summed over chunks in fp32.

    Args:
        hidden_NH, weight_VH, bias_V: of the linear layer.
        targets_N: class of each position, in [0, V).
        positions: of a chunk; None: as many as `CHUNK_ELEMENTS` logits are.
        factors_N: what each position weighs, in fp32; None: 1.
    """
    chunk = positions or max(MIN_POSITIONS, CHUNK_ELEMENTS // len(weight_VH))
    kind = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
    return _Chunked.apply(hidden_NH, weight_VH, bias_V, targets_N, factors_N, chunk, dtype, torch.is_grad_enabled())


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor,
        factors_N: Tensor | None, chunk: int, dtype: torch.dtype, is_trained: bool,
    ) -> Tensor:  # fmt: skip
        needs_dx, needs_weight, needs_bias = (is_trained and needs for needs in ctx.needs_input_grad[:3])
        layer = _Layer(weight_VH, bias_V, dtype)
        sums = _WeightGradients(weight_VH if needs_weight else None, bias_V if needs_bias else None)
        losses_N = torch.empty(len(hidden_NH), dtype=layer.wide, device=hidden_NH.device)
        dx_NH = torch.empty_like(hidden_NH, dtype=dtype) if needs_dx else None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, len(hidden_NH), chunk):
                rows = slice(start, start + chunk)
                x_CH = hidden_NH[rows].to(dtype)
                factors_C = None if factors_N is None else factors_N[rows]
                losses_N[rows], slopes_CV = layer.losses_and_slopes(x_CH, targets_N[rows], factors_C)
                if dx_NH is not None:
                    torch.mm(slopes_CV, layer.weight, out=dx_NH[rows])
                sums.add(slopes_CV, x_CH)
        if factors_N is not None:
            losses_N *= factors_N
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, factors_N, dx_NH, sums.weight, sums.bias)
        ctx.chunk, ctx.dtype = chunk, dtype
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight_N,) = grad_outputs
        hidden_NH, weight_VH, bias_V, targets_N, factors_N, dx_NH, dw_VH, db_V = ctx.saved_tensors
        dx = None if dx_NH is None else (dx_NH * weight_N.unsqueeze(-1)).to(hidden_NH.dtype)
        if dw_VH is None and db_V is None:
            return dx, None, None, None, None, None, None, None
        scale: Tensor | float = weight_N[0] if len(weight_N) else 0.0
        if not bool((weight_N == scale).all()):
            whole_N = weight_N if factors_N is None else weight_N * factors_N
            sums = _WeightGradients(None if dw_VH is None else weight_VH, None if db_V is None else bias_V)
            layer = _Layer(weight_VH, bias_V, ctx.dtype)
            with torch.autocast(hidden_NH.device.type, enabled=False):
                for start in range(0, len(hidden_NH), ctx.chunk):
                    rows = slice(start, start + ctx.chunk)
                    x_CH = hidden_NH[rows].to(ctx.dtype)
                    _, slopes_CV = layer.losses_and_slopes(x_CH, targets_N[rows], whole_N[rows])
                    sums.add(slopes_CV, x_CH)
            dw_VH, db_V, scale = sums.weight, sums.bias, 1.0
        dw = None if dw_VH is None else (dw_VH * scale).to(weight_VH.dtype)
        db = None if db_V is None else (db_V * scale).to(bias_V.dtype)
        return dx, dw, db, None, None, None, None, None


class _Layer:
    """A linear layer in the type that products are made in."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.weight, self.bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)

    def losses_and_slopes(
        self, x_CH: Tensor, targets_C: Tensor, weights_C: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each position [C], and its gradient by the logits [C, V], times `weights_C`."""
        logs_CV = functional.linear(x_CH, self.weight, self.bias).to(self.wide).log_softmax(-1)
        index_C1 = targets_C.unsqueeze(-1)
        losses_C = -logs_CV.gather(-1, index_C1).squeeze(-1)
        slopes_CV = logs_CV.exp_()
        slopes_CV.scatter_add_(-1, index_C1, slopes_CV.new_full(index_C1.shape, -1.0))
        if weights_C is not None:
            slopes_CV.mul_(weights_C.unsqueeze(-1))
        return losses_C, slopes_CV.to(self.dtype)


class _WeightGradients:
    """Sums of dW and of the bias' gradient over chunks; None where they are not wanted."""

    def __init__(self, weight_VH: Tensor | None, bias_V: Tensor | None) -> None:
        self.weight = None if weight_VH is None else _zeros(weight_VH)
        self.bias = None if bias_V is None else _zeros(bias_V)

    def add(self, slopes_CV: Tensor, x_CH: Tensor) -> None:
        if self.weight is not None:
            if x_CH.dtype == self.weight.dtype:
                torch.addmm(self.weight, slopes_CV.t(), x_CH, out=self.weight)
            else:
                self.weight += slopes_CV.t() @ x_CH
        if self.bias is not None:
            self.bias += slopes_CV.sum(0)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
