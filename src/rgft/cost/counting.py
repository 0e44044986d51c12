"""PyTorch's FLOP counter with the formulas it lacks or gets wrong, so that it can audit the cost model.

Where `FlopCounterMode` itself departs from the work done, mended here:

- CPU flash attention is counted as 0;
- `_grouped_mm` (mixture-of-experts products) is counted as 0;
- the weight gradient of a grouped convolution is counted `groups` times (its formula ignores groups).

Where it departs and is followed, because kernels differ and both sides of a ratio are counted alike: causal attention
counts as full attention, fused attention backward as 2.5 × forward whichever operands need a gradient, and
elementwise work, norms, softmax, embedding look-ups and the optimizer count as nothing. Not counted at all, and not
mended: `nn.TransformerEncoder`'s inference kernel, which frozen layers take in eval mode.
"""

from __future__ import annotations

from math import prod
from typing import Any, Self

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.module_tracker import ModuleTracker

Shape = tuple[int, ...]

#: FLOPs of fused attention's backward pass per FLOP of its forward pass: five products against two.
FUSED_ATTENTION_BACKWARD = 2.5


def grouped_mm_flops(self_shape: Shape, mat2_shape: Shape) -> int:
    """FLOPs of `_grouped_mm`: 2 × rows × inner × columns over all groups together.

    Layouts: (M, K)·(G, K, N) and (G, M, K)·(K, N) with the groups along M or N; (M, K)·(K, N) with the groups along
    K; (G, M, K)·(G, K, N) is batched.
    """
    groups = self_shape[0] if len(self_shape) == len(mat2_shape) == 3 else 1
    return 2 * groups * self_shape[-2] * self_shape[-1] * mat2_shape[-1]


def _grouped_mm(self_shape: Shape, mat2_shape: Shape, *_args: Any, **_kwargs: Any) -> int:
    return grouped_mm_flops(self_shape, mat2_shape)


def _attention(query: Shape, key: Shape, value: Shape, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad_out: Shape, query: Shape, key: Shape, value: Shape, *_args: Any, **_kwargs: Any
) -> int:  # fmt: skip
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _convolution_backward(
    grad_out: Shape, x: Shape, weight: Shape, _bias: Any, _stride: Any, _padding: Any, _dilation: Any,
    transposed: bool, _output_padding: Any, _groups: int, output_mask: list[bool], **_kwargs: Any,
) -> int:  # fmt: skip
    # Either product does the multiplications of the forward pass, whose formula divides by groups through `weight`.
    forward = conv_flop_count(list(x), list(weight), list(grad_out), transposed=transposed)
    return forward * sum(output_mask[:2])


_MENDED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped_mm,
    torch.ops.aten.convolution_backward: _convolution_backward,
}


def flop_counter() -> FlopCounterMode:
    """A fresh `FlopCounterMode` with the mended formulas; forward, backward and custom autograd functions count.

    It counts in total alone: what follows modules through the backward pass fails under `torch.autograd.grad` with
    respect to a module's inputs, which signals ask for.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MENDED)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Knows of no module but the whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def is_product(operator: Any) -> bool:
    """Whether FLOPs of the operator (an overload) are counted."""
    return operator.overloadpacket in flop_registry or operator.overloadpacket in _MENDED


def matmul_flops(out_shape: Shape, inner: int) -> int:
    """FLOPs of a (batched) matrix product with the given result shape and inner dimension."""
    return 2 * prod(out_shape) * inner
