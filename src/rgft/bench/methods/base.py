"""What a method of the comparison is: how it prepares the model, and which configuration it runs under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rgft.config import Config
from rgft.errors import ConfigError
from rgft.execution.agreement import Loss
from rgft.guide import Guide
from rgft.run import Run, Settings


def unchanged(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The model as it is."""
    return model


def unchanged_loss(loss: Loss) -> Loss:
    """The loss as it is."""
    return loss


def nothing(run: Run) -> None:
    """Nothing is done beside training."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What an optimizer is made with.

    Attributes:
        lr: learning rate at multiplier 1.
        weight_decay: of weights.
        settings: of the method.
    """

    lr: float
    weight_decay: float
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What a method takes from another's run.

    Attributes:
        config: RGFT settings, over the method's own.
        lr_factor: multiplies the learning rate.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: in experiments and tables.
        title: in words.
        source: the paper.
        cost: what it saves of a step of full fine-tuning, and what it does not, in words.
        config: RGFT settings, without budget and seed.
        prepare: (model, settings) → the model that is trained.
        changes_model: whether `prepare` wraps the model or freezes some of it, so that full fine-tuning's FLOPs must
            come from the plain one.
        loss: the task's loss → what is trained on. It is evaluated on, too, with the model in eval mode.
        optimizer: (guide, rates) → its own optimizer; None: the one that the run's settings name.
        begin: called with the run when it is prepared and not begun yet: what is to be done beside its steps.
        follows: (result of RGFT's run with the same seed, settings) → what it takes of it; None: it takes nothing.
        revision: raised whenever the same settings no longer make the same run, so that stored results of an earlier
            one are not taken for its own.
    """

    name: str
    title: str
    source: str = ""
    cost: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module, Mapping[str, Any]], nn.Module] = unchanged
    changes_model: bool = False
    loss: Callable[[Loss], Loss] = unchanged_loss
    optimizer: Callable[[Guide, Rates], Optimizer] | None = None
    begin: Callable[[Run], None] = nothing
    follows: Callable[[Mapping[str, Any], Mapping[str, Any]], Followed] | None = None
    revision: int = 1

    def configuration(
        self, *, budget: float, seed: int, settings: Mapping[str, Any], followed: Followed | None = None
    ) -> Config:
        """The configuration of one run; `settings["config"]` is laid over what it follows, and that over its own.

        Raises:
            ConfigError: it follows a run of RGFT, and was not told what to take of it; or any setting is wrong.
        """
        if self.follows is not None and followed is None:
            raise ConfigError(f"{self.name}: expected what it takes of a run of RGFT (followed=…), found none")
        taken = {} if followed is None else followed.config
        return Config.from_dict(
            {**self.config, **taken, **settings.get("config", {}), "budget": budget, "seed": seed}
        )  # fmt: skip

    def optimizer_of(
        self, run: Settings, settings: Mapping[str, Any]
    ) -> Callable[[Guide, float], Optimizer] | None:  # fmt: skip
        """How a run of those settings makes its optimizer; None: as they name it."""
        own = self.optimizer
        if own is None:
            return None
        return lambda guide, lr: own(guide, Rates(lr=lr, weight_decay=run.weight_decay, settings=settings))
