"""What a method of the comparison is: how it prepares the model, and which configuration it runs under."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rgft.config import Config
from rgft.config.presets import laid_over
from rgft.errors import ConfigError
from rgft.execution.agreement import Loss
from rgft.guide import Guide
from rgft.run import Run, Settings

#: Settings of every method: RGFT's own, and how it finds a learning rate by itself.
COMMON = ("config", "lr")

#: Adapters and single vectors have rates ten times those of dense weights: a new head trains at the same, as in PEFT's
#: own training, and not at a multiple of it.
HEAD_AT_OWN_RATE: Mapping[str, Any] = {"classifier_lr_multiplier": 1.0}

#: (model, the method's settings) → the model that is trained.
Change = Callable[[nn.Module, Mapping[str, Any]], nn.Module]


def unchanged_loss(loss: Loss, settings: Mapping[str, Any]) -> Loss:
    """The loss as it is."""
    return loss


def nothing(run: Run) -> None:
    """Nothing is done beside training."""


def steps_of(run: Run) -> int:
    """About how many steps a prepared run of constant cost has, which adapters and single weights are; at least 1."""
    return max(1, int(min(run.guide.steps_left, run.batches_in_full / run.settings.accumulation)))


def variants_of(setting: str, *values: float | str, name: str = "") -> dict[str, dict[str, Any]]:
    """Variants in one setting, "name-value" → settings.

    Args:
        setting: its path, as in "config.policy.layers".
        values: that it has in place of the method's own.
        name: empty: the last part of the path.
    """
    *groups, last = setting.split(".")
    found: dict[str, dict[str, Any]] = {}
    for value in values:
        settings: dict[str, Any] = {last: value}
        for group in reversed(groups):
            settings = {group: settings}
        found[f"{name or last}-{value}"] = settings
    return found


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
        instead: RGFT settings in place of those that an experiment's contenders share; a contender's own precede.
        settings: its own, beside those of every method, and their defaults; of what is a mapping here, no other keys
            are known either.
        variants: name → settings with other values of the one that it depends on most, its rate aside; empty where
            it has none. Experiments tune over them, its own values among them, where they ask for "method".
        change: wraps the model or freezes some of it; None: the model as it is.
        loss: (the task's loss, the method's settings) → what is trained on. It is evaluated on, too, with the model in
            eval mode.
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
    instead: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    change: Change | None = None
    loss: Callable[[Loss, Mapping[str, Any]], Loss] = unchanged_loss
    optimizer: Callable[[Guide, Rates], Optimizer] | None = None
    begin: Callable[[Run], None] = nothing
    follows: Callable[[Mapping[str, Any], Mapping[str, Any]], Followed] | None = None
    revision: int = 1

    @property
    def changes_model(self) -> bool:
        """Whether full fine-tuning's FLOPs must come from the plain model."""
        return self.change is not None

    def problems_of(self, settings: Mapping[str, Any]) -> list[str]:
        """What it does not know of the settings, each with the nearest that it does."""
        return _unknown("settings", settings, {**dict.fromkeys(COMMON), **self.settings})

    def prepare(self, model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
        """The model that is trained, made of the plain one."""
        return model if self.change is None else self.change(model, self._own(settings))

    def loss_of(self, loss: Loss, settings: Mapping[str, Any]) -> Loss:
        """What is trained on, made of the task's loss."""
        return self.loss(loss, self._own(settings))

    def _own(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The method's own settings: those given over its defaults."""
        return laid_over(self.settings, {key: value for key, value in settings.items() if key in self.settings})

    def configuration(
        self, *, budget: float, seed: int, settings: Mapping[str, Any], followed: Followed | None = None
    ) -> Config:
        """The configuration of one run; `settings["config"]` is laid over what it follows, and that over its own.

        Groups and stages are merged as `laid_over` says.

        Raises:
            ConfigError: it follows a run of RGFT, and was not told what to take of it; or any setting is wrong.
        """
        if self.follows is not None and followed is None:
            raise ConfigError(f"{self.name}: expected what it takes of a run of RGFT (followed=…), found none")
        own = laid_over(self.config, {} if followed is None else followed.config)
        return Config.from_dict({**laid_over(own, settings.get("config", {})), "budget": budget, "seed": seed})

    def optimizer_of(
        self, run: Settings, settings: Mapping[str, Any]
    ) -> Callable[[Guide, float], Optimizer] | None:  # fmt: skip
        """How a run of those settings makes its optimizer; None: as they name it."""
        own = self.optimizer
        if own is None:
            return None
        own_settings = self._own(settings)
        return lambda guide, lr: own(guide, Rates(lr=lr, weight_decay=run.weight_decay, settings=own_settings))


def _unknown(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(key, known, n=3) or sorted(known)
            problems.append(f"{where}.{key}: there is no such setting (found {value!r}); nearest: {', '.join(near)}")
        elif isinstance(known[key], Mapping) and isinstance(value, Mapping):
            problems += _unknown(f"{where}.{key}", value, known[key])
    return problems
