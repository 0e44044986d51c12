"""What a method of the comparison is: how it prepares the model, and which configuration it runs under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rgft.config import Config
from rgft.execution.agreement import Loss
from rgft.run import Run


def unchanged(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The model as it is."""
    return model


def unchanged_loss(loss: Loss) -> Loss:
    """The loss as it is."""
    return loss


def nothing(run: Run) -> None:
    """Nothing is done beside training."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: in experiments and tables.
        title: in words.
        source: the paper.
        config: RGFT settings, without budget and seed.
        prepare: (model, settings) → the model that is trained.
        changes_model: whether `prepare` wraps the model, so that full fine-tuning's FLOPs must come from the plain one.
        loss: the task's loss → what is trained on. It is evaluated on, too, with the model in eval mode.
        begin: called with the run when it is prepared and not begun yet: what is to be done beside its steps.
    """

    name: str
    title: str
    source: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = unchanged
    changes_model: bool = False
    loss: Callable[[Loss], Loss] = unchanged_loss
    begin: Callable[[Run], None] = nothing

    def configuration(self, *, budget: float, seed: int, settings: Mapping[str, Any]) -> Config:
        """The configuration of one run; `settings["config"]` is laid over the method's own."""
        return Config.from_dict({**self.config, **settings.get("config", {}), "budget": budget, "seed": seed})
