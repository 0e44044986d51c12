"""What a method of the comparison is: how it prepares the model, and which configuration it runs under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rgft.config import Config


def unchanged(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The model as it is."""
    return model


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
    """

    name: str
    title: str
    source: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = unchanged
    changes_model: bool = False

    def configuration(self, *, budget: float, seed: int, settings: Mapping[str, Any]) -> Config:
        """The configuration of one run; `settings["config"]` is laid over the method's own."""
        return Config.from_dict({**self.config, **settings.get("config", {}), "budget": budget, "seed": seed})
