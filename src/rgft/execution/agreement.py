"""Whether two ways of computing a loss agree, in its value and in every gradient, but for the order of sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: model, batch → losses per example or a scalar.
Loss = Callable[[nn.Module, Any], Tensor]

#: Norm-relative difference allowed to rounding: a product of fewer rows may be summed in another order.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
COARSE_TOLERANCE = 5e-2
#: Norm of a parameter's gradient, relative to the largest one, below which it need not be equal in itself.
NEGLIGIBLE = 1e-2


def loss_and_gradients(model: nn.Module, loss: Loss, batch: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The loss, then the gradient of its mean by each parameter (zeros where it has none)."""
    value = loss(model, batch)
    gradients = torch.autograd.grad(value.mean(), parameters, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def all_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the results of `loss_and_gradients` agree."""
    # Gradients that are zero but for rounding (a key's bias) are compared on the scale of the others.
    least = NEGLIGIBLE * float(torch.stack([torch.linalg.vector_norm(g.double()) for g in expected[1:]]).max())
    return all(is_close(a, b, least=least) for a, b in zip(found, expected, strict=True))


def is_close(value: Tensor, expected: Tensor, *, least: float = 0.0) -> bool:
    """Whether a tensor is as expected, within its type's tolerance of its norm (of `least`, if that is larger)."""
    tolerance = TOLERANCE.get(expected.dtype, COARSE_TOLERANCE)
    distance = float(torch.linalg.vector_norm((value.detach() - expected.detach()).double()))
    return distance <= tolerance * max(least, float(torch.linalg.vector_norm(expected.detach().double())))
