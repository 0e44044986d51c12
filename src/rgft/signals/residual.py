"""Residuals of activations (proposal A): how far the residual of the output reaches back to each layer and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rgft.errors import DataError
from rgft.signals.base import Probe, Signal, at_least_float32
from rgft.signals.captures import as_floats, capture, unit_scores
from rgft.signals.gradient import check_choice
from rgft.signals.targets import targets_of


@dataclass(frozen=True, kw_only=True)
class ResidualDot(Signal):
    """R_l = ⟨∂R/∂h_l, ∂L/∂h_l⟩ over batch × tokens × width, for the output h_l of each layer (proposal A).

    R = ‖y − ŷ‖²: Brier's score for classification (of one label or several) and language models (mean over targets),
    squared error for regression. For head a, h_{l,a} is its slice of the attention context before the output
    projection; every other component of a layer gets the layer's value; components outside the layers are left out.
    Costs one forward pass and two vector–Jacobian products down to the lowest layer, one when L is R; no dW.

    Known weakness: softmax saturates, so the Brier residual's gradient vanishes where the model is confidently wrong,
    exactly where the error is largest. With three or more classes the two gradients may disagree and R_l be negative.

    Attributes:
        mode: "clamped" max(0, R_l), "abs" |R_l|, or "signed", the literal form.
        residual: None for the above, "loss" when L itself is the residual (one product instead of two: ‖∂L/∂h_l‖²), or
            a function from the model's output and the batch to a scalar.
        outputs: function from the model's output to logits, where they cannot be found.
        shift: whether token labels are one position ahead of their logits; None: seen from the batch.
    """

    name: ClassVar[str] = "residual_dot"
    mode: Literal["clamped", "abs", "signed"] = "clamped"
    residual: Callable[[Any, Any], Tensor] | Literal["loss"] | None = None
    outputs: Callable[[Any], Tensor] | None = None
    shift: bool | None = None

    def __post_init__(self) -> None:
        check_choice("residual_dot.mode", self.mode, ("clamped", "abs", "signed"))
        if not (self.residual in (None, "loss") or callable(self.residual)):
            check_choice("residual_dot.residual", self.residual, (None, "loss"))

    def measure(self, probe: Probe) -> dict[str, float]:
        with capture(probe, gradients=True) as seen:
            loss = probe.loss(probe.model, probe.batch)
            residual = None if self.residual == "loss" else self._residual(probe, seen.outputs)
            tensors = seen.tensors
            if not tensors:
                return {}
            loss_gradients = torch.autograd.grad(loss, tensors, retain_graph=residual is not None, allow_unused=True)
            residual_gradients = (
                loss_gradients if residual is None else torch.autograd.grad(residual, tensors, allow_unused=True)
            )
        pairs = {
            id(tensor): (at_least_float32(of_loss), at_least_float32(of_residual))
            for tensor, of_loss, of_residual in zip(tensors, loss_gradients, residual_gradients, strict=True)
            if of_loss is not None and of_residual is not None
        }

        def dot(tensor: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor | None:
            pair = pairs.get(id(tensor))
            return None if pair is None else (cut(pair[0]) * cut(pair[1])).sum()

        return {name: self._signed(value) for name, value in as_floats(unit_scores(probe, seen, dot)).items()}

    def _residual(self, probe: Probe, outputs: list[Any]) -> Tensor:
        if len(outputs) != 1:
            raise DataError(
                f"expected the loss to call the model once; it was called {len(outputs)} times, so the residual is not "
                "defined; pass residual='loss'"
            )
        if callable(self.residual):
            return self.residual(outputs[0], probe.batch)
        targets = targets_of(probe.model, probe.batch, outputs[0], outputs=self.outputs, shift=self.shift)
        return targets.residual()

    def _signed(self, value: float) -> float:
        if self.mode == "signed":
            return value
        return abs(value) if self.mode == "abs" else max(0.0, value)
