"""The loss decrease that an optimizer's step causes, to first order: on the batch that made it, and on another.

Δθ_k is the step at reference learning rate (multiplier and schedule divided out) and without decay, so that no
component is rewarded for its own multiplier. Units: loss.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rgft.blocks import row_blocks
from rgft.errors import ConfigError
from rgft.signals.base import GradientSignal, PartGradient, at_least_float32


class _Decrease(GradientSignal, ABC):
    """−⟨g_k, Δθ_k⟩, summed over the component's slices."""

    needs_update: ClassVar[bool] = True

    def partial(self, part: PartGradient) -> Tensor:
        if part.update is None:
            raise ConfigError(f"signal {self.name!r} needs the optimizer's step; found a gradient without one")
        gradient, update = part.gradient, part.update
        products = [
            (at_least_float32(gradient[rows]) * at_least_float32(update[rows])).sum() for rows in row_blocks(gradient)
        ]
        return -torch.stack(products).sum()

    @property
    def sketchable(self) -> Literal["squared_norm", "decrease"] | None:
        return "decrease"


@dataclass(frozen=True, kw_only=True)
class PredictedDecrease(_Decrease):
    """−⟨g_k(A), Δθ_k(A)⟩: the decrease on the batch A that made the step, as GreenTrainer's importance Σ g·Δw.

    Mostly positive by construction, noise included: it shows what a component learns, memorised or not.
    """

    name: ClassVar[str] = "predicted_decrease"


@dataclass(frozen=True, kw_only=True)
class GeneralisingDecrease(_Decrease):
    """−⟨g_k(B), Δθ_k(A)⟩ with B independent of A: the decrease that carries over to examples the step has not seen.

    The noise of the two batches is independent, so its expectation is that of the true gradient's decrease; single
    observations are negative when a component only memorises. Whoever makes the probe sees to it that B had no part in
    the step. The ratio to `PredictedDecrease` tells what a component learns against what it memorises.
    """

    name: ClassVar[str] = "generalising_decrease"
