"""What happens to the optimizer state of a component that is off (spec: keep, decay, reset, offload)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rgft.execution.binding import Binding
from rgft.execution.optimizers import counts_in_groups

#: Running values in a group of a schedule-free optimizer before its first step.
BEGINNING = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}

MomentMode = Literal["keep", "decay", "reset", "offload"]


class Moments:
    """Keeps, decays, resets or offloads optimizer state as components go off and come back.

    `keep` leaves state and step count alone. `decay` multiplies Adam's first moment by β₁^Δ and its second by β₂^Δ
    (SGD's momentum by its factor^Δ, others' statistics likewise) after Δ steps off, as if zero gradients had come in
    meanwhile. `reset` drops the state. `offload` moves it to the CPU's memory and back, unchanged.
    """

    def __init__(self, optimizer: Optimizer, binding: Binding, mode: MomentMode) -> None:
        self._optimizer = optimizer
        self._binding = binding
        self._mode = mode
        self._off_since: dict[str, int] = {}

    def switch(self, *, turned_off: Iterable[str], turned_on: Iterable[str], step: int) -> None:
        """Called when a plan comes into force, before the step `step`.

        Args:
            turned_off, turned_on: parts of the binding.
            step: the next one.
        """
        for name in turned_off:
            self._off_since[name] = step
            if self._mode == "reset":
                self._drop(name)
            elif self._mode == "offload":
                self._move(name, to_cpu=True)
        for name in turned_on:
            since = self._off_since.pop(name, step)
            if self._mode == "decay":
                self._decay(name, step - since)
            elif self._mode == "offload":
                self._move(name, to_cpu=False)

    def _drop(self, name: str) -> None:
        own = {id(parameter) for parameter in self._binding.parts[name]}
        for parameter in self._binding.parts[name]:
            self._optimizer.state.pop(parameter, None)
        for group in self._optimizer.param_groups if counts_in_groups(self._optimizer) else ():
            if any(id(parameter) in own for parameter in group["params"]):
                group |= {key: value for key, value in BEGINNING.items() if key in group}

    def _decay(self, name: str, steps: int) -> None:
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        for parameter in self._binding.parts[name]:
            state, group = self._optimizer.state.get(parameter), groups.get(id(parameter))
            if not state or group is None:
                continue
            for key, factor in _decay_factors(self._optimizer, group, state, steps).items():
                value = state.get(key)
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.mul_(factor)

    def _move(self, name: str, *, to_cpu: bool) -> None:
        for parameter in self._binding.parts[name]:
            state = self._optimizer.state.get(parameter, {})
            target = torch.device("cpu") if to_cpu else parameter.device
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:  # step counters stay where the optimizer wants them
                    state[key] = value.to(target)

    def state_dict(self) -> dict[str, int]:
        return dict(self._off_since)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._off_since = dict(state)


def _decay_factors(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], steps: int
) -> dict[str, float]:  # fmt: skip
    """Key of a parameter's state → what so many gradients of zero would have multiplied it by."""
    momentum = float(group.get("momentum", 0.0)) ** steps
    if "beta2_decay" in group or "decay_rate" in group:  # Adafactor, whose β₂ of step t is 1 − t^τ
        exponent, made = group.get("beta2_decay", group.get("decay_rate")), float(state.get("step", 0))
        kept = math.prod(1.0 - (made + later) ** exponent for later in range(1, steps + 1))
        keys = ("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
        first = 0.0 if group.get("beta1") is None else group["beta1"] ** steps
        return {**dict.fromkeys(keys, kept), "exp_avg": first}
    beta1, beta2 = group.get("betas", (0.0, 1.0))[:2]
    # Lion's momentum decays with its second factor; the first weighs the step.
    first = (beta2 if "lion" in type(optimizer).__name__.lower() else beta1) ** steps
    second = beta2**steps
    quantised = "absmax1" in state  # of 8-bit blocks the scales are multiplied, which is exact
    return {
        "exp_avg": first, "exp_avg_sq": second, "max_exp_avg_sq": second, "momentum_buffer": momentum,
        "absmax1" if quantised else "state1": first, "absmax2" if quantised else "state2": second,
    }  # fmt: skip
