"""The step that any optimizer would make, found out by letting it step a copy.

What the optimizer computes is taken from nowhere else, so that this holds for every optimizer whose step of a parameter
depends on that parameter, its gradient, its state and its group: factored and quantised state, signs, orthogonalised
matrices. It costs a step of that parameter and a copy of it.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: What indexes the rows of a tensor; see `rgft.blocks.Rows`.
Rows = Any


@dataclass(frozen=True, kw_only=True)
class DryStep:
    """What a step would be.

    Attributes:
        direction: −Δθ/η at reference learning rate and without decay, in float32 at least. Of optimizers that average
            their iterates it is the step of what is averaged (schedule-free: z), for the mean follows older steps.
        spoils_gradient: whether the step writes into the gradient that it is given.
    """

    direction: Tensor
    spoils_gradient: bool


@torch.no_grad()
def dry_step(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor, rows: Rows = ...
) -> DryStep:  # fmt: skip
    """The step of some rows of a parameter. Neither parameter, gradient, state nor group is changed.

    Args:
        optimizer: whose own `step` is called on the copy.
        group: of the parameter.
        parameter: whole, as the optimizer holds it.
        gradient: of those `rows`.
        rows: of optimizers that are not elementwise, all of them (`...`).
    """
    copy = nn.Parameter(_at_least_float32(parameter.detach()[rows]).clone())
    copy.grad = _at_least_float32(gradient).clone(memory_format=torch.contiguous_format)
    kept = optimizer.state.get(parameter) or {}
    state = {key: _of_rows(value, parameter, rows) for key, value in kept.items()}
    settings = {**group, "params": [copy], "lr": _like(group["lr"], reference_rate(group))}
    settings |= {key: 0.0 for key in ("weight_decay",) if key in group}
    settings |= {key: False for key in ("fused", "foreach") if key in group}
    stepped = object.__new__(type(optimizer))
    stepped.__dict__.update(optimizer.__dict__)
    stepped.param_groups, stepped.state = [settings], defaultdict(dict)
    if state:
        stepped.state[copy] = state
    stepped._optimizer_step_pre_hooks, stepped._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    averaged = "train_mode" in group  # schedule-free optimizers
    before = state["z"].clone() if averaged and state else copy.detach().clone()
    version = copy.grad._version
    type(optimizer).step(stepped)  # not the instance's, which a scheduler counts the calls of
    after = stepped.state[copy]["z"] if averaged else copy.detach()
    rate = float(settings.get("scheduled_lr", settings["lr"]))  # after a warm-up of the optimizer's own
    return DryStep(direction=(before - after).div_(rate), spoils_gradient=copy.grad._version > version)


def reference_rate(group: Mapping[str, Any]) -> float:
    """Learning rate of a group before any schedule."""
    return float(group.get("initial_lr", group["lr"]))


def _of_rows(value: Any, parameter: Tensor, rows: Rows) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:  # a count of steps, which stays where the optimizer wants it
        return value.clone()
    part = value[rows] if value.shape == parameter.shape and rows is not ... else value
    part = part.to(parameter.device)  # moments of what is off may be elsewhere
    return _at_least_float32(part).clone() if part.is_floating_point() else part.clone()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _like(kind: Any, value: float) -> Any:
    """A learning rate as the optimizer keeps its own: a number, or a tensor."""
    return torch.full_like(kind, value) if isinstance(kind, Tensor) else value
