"""The optimizers that a run can be told to use by name: how each is made, and what it asks of the run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import SGD, Adafactor, Optimizer

from rgft.errors import ConfigError, OptimizerError
from rgft.optimizer.adamw import adamw
from rgft.optimizer.muon import MuonAdamW

Groups = list[dict[str, Any]]

Name = Literal["adamw", "sgd", "adafactor", "lion", "muon", "schedule-free", "adamw-8bit"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An optimizer that is known by name.

    Attributes:
        name: in settings.
        build: (groups with rates and decays, learning rate of groups without) → optimizer.
        is_elementwise: whether the step of an element depends on that element alone, so that slices of a weight are
            stepped as the whole would be. Others need whole parameters: granularity "layer", "block" or "adapter".
        groups: "rate": parameters are grouped by rate and decay; "matrix": hidden layers' matrices also stand apart;
            "component": each component also has groups of its own, because the optimizer counts steps per group.
        rate_factor: of its usual learning rate against AdamW's.
        is_schedule_free: whether it averages its iterates itself, and wants a constant rate after the warm-up.
    """

    name: Name
    build: Callable[[Groups, float], Optimizer]
    is_elementwise: bool = True
    groups: Literal["rate", "matrix", "component"] = "rate"
    rate_factor: float = 1.0
    is_schedule_free: bool = False


def _sgd(groups: Groups, lr: float) -> Optimizer:
    return SGD(groups, lr=lr, momentum=0.9)


def _adafactor(groups: Groups, lr: float) -> Optimizer:
    return Adafactor(groups, lr=lr)


def _lion(groups: Groups, lr: float) -> Optimizer:
    return _from_extra("lion_pytorch", "lion").Lion(groups, lr=lr)


def _muon(groups: Groups, lr: float) -> Optimizer:
    return MuonAdamW(groups, lr=lr)


def _schedule_free(groups: Groups, lr: float) -> Optimizer:
    optimizer = _from_extra("schedulefree", "schedule-free").AdamWScheduleFree(groups, lr=lr)
    optimizer.train()
    return optimizer


def _adamw_8bit(groups: Groups, lr: float) -> Optimizer:
    return _from_extra("bitsandbytes", "adamw-8bit").optim.AdamW8bit(groups, lr=lr)


def _from_extra(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptimizerError(
            f"optimizer {name!r} is {module}'s, which cannot be imported ({error}); install rgft[optimizers]"
        ) from error


#: Learning rates against AdamW's: Lion's as its paper says (Chen et al. 2023: 3–10 times smaller), Adafactor's is
#: relative to the weights' size, the others' are rules of thumb.
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name="adamw", build=lambda groups, lr: adamw(groups, lr=lr)),
        Kind(name="sgd", build=_sgd, rate_factor=100.0),
        Kind(name="adafactor", build=_adafactor, is_elementwise=False, rate_factor=25.0),
        Kind(name="lion", build=_lion, rate_factor=0.2),
        Kind(name="muon", build=_muon, is_elementwise=False, groups="matrix"),
        Kind(name="schedule-free", build=_schedule_free, groups="component", rate_factor=2.0, is_schedule_free=True),
        Kind(name="adamw-8bit", build=_adamw_8bit, is_elementwise=False),
    )
}


def kind_named(name: str) -> Kind:
    """The optimizer of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(f"optimizer: expected one of {', '.join(KINDS)}, found {name!r}")
    return KINDS[name]
