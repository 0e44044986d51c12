"""What happens to the optimizer state of a component that is off (spec: keep, decay, reset, offload)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from rgft.execution.binding import Binding

MomentMode = Literal["keep", "decay", "reset", "offload"]


class Moments:
    """Keeps, decays, resets or offloads optimizer state as components go off and come back.

    `keep` leaves state and step count alone. `decay` multiplies Adam's first moment by β₁^Δ and its second by β₂^Δ
    (SGD's momentum by its factor^Δ) after Δ steps off, as if zero gradients had come in meanwhile. `reset` drops the
    state. `offload` moves it to the CPU's memory and back, unchanged.
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
                for parameter in self._binding.parts[name]:
                    self._optimizer.state.pop(parameter, None)
            elif self._mode == "offload":
                self._move(name, to_cpu=True)
        for name in turned_on:
            since = self._off_since.pop(name, step)
            if self._mode == "decay":
                self._decay(name, step - since)
            elif self._mode == "offload":
                self._move(name, to_cpu=False)

    def _decay(self, name: str, steps: int) -> None:
        factors: dict[int, dict[str, float]] = {}
        for group in self._optimizer.param_groups:
            betas = cast("tuple[float, float]", group.get("betas", (group.get("momentum", 0.0), 1.0)))
            table = {
                "exp_avg": betas[0] ** steps, "exp_avg_sq": betas[1] ** steps, "max_exp_avg_sq": betas[1] ** steps,
                "momentum_buffer": float(group.get("momentum", 0.0)) ** steps,
            }  # fmt: skip
            for parameter in group["params"]:
                factors[id(parameter)] = table
        for parameter in self._binding.parts[name]:
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and id(parameter) in factors and key in factors[id(parameter)]:
                    value.mul_(factors[id(parameter)][key])

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
