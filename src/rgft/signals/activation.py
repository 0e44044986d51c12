"""Activation times gradient: what the loss would lose, to first order, with a unit's output gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgft.signals.base import Probe, Signal, at_least_float32
from rgft.signals.captures import as_floats, capture, unit_scores


@dataclass(frozen=True, kw_only=True)
class ActXGrad(Signal):
    """|⟨h, ∂L/∂h⟩| of each layer's output and each head's context (Michel et al. 2019, "Are Sixteen Heads…", eq. 2).

    The sum runs over batch, tokens and width before the absolute value. A layer's components that are no head get the
    layer's score; components outside the layers are left out. One forward pass and one backward pass without dW.
    """

    name: ClassVar[str] = "act_x_grad"

    def measure(self, probe: Probe) -> dict[str, float]:
        with capture(probe, gradients=True) as seen:
            loss = probe.loss(probe.model, probe.batch)
            tensors = seen.tensors
            if not tensors:
                return {}
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        known = {id(t): g for t, g in zip(tensors, gradients, strict=True) if g is not None}

        def dot(tensor: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor | None:
            gradient = known.get(id(tensor))
            if gradient is None:
                return None
            return (at_least_float32(cut(tensor.detach())) * at_least_float32(cut(gradient))).sum()

        return {name: abs(value) for name, value in as_floats(unit_scores(probe, seen, dot)).items()}
