"""Learning-rate multipliers, applied for the length of one optimizer step and taken back.

A step pre-hook splits the optimizer's groups by multiplier and the post-hook puts the user's groups back, so that
schedulers (also those that chain on the current value, as cosine and exponential do) never see a multiplied rate.
Components with equal multipliers share a group. With all multipliers 1 nothing is touched: bit-identical.

Where groups hold running values (schedule-free optimizers, a component's groups each), those whose component got no
gradient are left out of the step, so that they count no step, and what the step counted is carried back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch.optim import Optimizer

from rgft.execution.binding import Binding
from rgft.execution.optimizers import counts_in_groups


class _Parts:
    """A group's parameters by their multiplier."""

    def __init__(self, parameters: Sequence[Any], by_parameter: Mapping[int, float]) -> None:
        self._parameters = tuple(parameters)
        self.by_factor: dict[float, list[Any]] = {}
        for parameter in parameters:
            self.by_factor.setdefault(by_parameter.get(id(parameter), 1.0), []).append(parameter)

    def are_of(self, parameters: Sequence[Any]) -> bool:
        """Whether they were made of these same parameters."""
        return len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))


class Multipliers:
    """Scales the learning rate of each component's parameters while `optimizer.step()` runs."""

    def __init__(self, optimizer: Optimizer, binding: Binding) -> None:
        self._binding = binding
        self._multipliers: dict[str, float] = {}
        self._by_parameter: dict[int, float] = {}
        self._parts: dict[int, _Parts] = {}
        self._saved: list[dict[str, Any]] | None = None
        self._optimizer = optimizer
        self._counts = counts_in_groups(optimizer)
        self._counted: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a group, and what stands for it in the step
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def set(self, multipliers: Mapping[str, float]) -> None:
        """Multiplier per component name; missing names have 1. Cheap when nothing changes."""
        if multipliers == self._multipliers:
            return
        self._multipliers = dict(multipliers)
        self._parts.clear()
        self._by_parameter = {
            id(parameter): multipliers[name]
            for name, parameters in self._binding.held.items()
            if multipliers.get(name, 1.0) != 1.0
            for parameter in parameters
        }

    def detach(self) -> None:
        self.restore(self._optimizer)  # a step may have raised
        for handle in self._handles:
            handle.remove()

    def _split(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore(optimizer)  # the last step may have raised before its post-hook
        if not self._by_parameter and not self._counts:
            return
        self._saved = optimizer.param_groups
        parts = [(group, part) for index, group in enumerate(self._saved) for part in self._split_group(index, group)]
        if self._counts:
            parts = self._counted = [pair for pair in parts if any(p.grad is not None for p in pair[1]["params"])]
        optimizer.param_groups = [part for _, part in parts]

    def _split_group(self, index: int, group: dict[str, Any]) -> list[dict[str, Any]]:
        known = self._parts.get(index)
        if known is None or not known.are_of(group["params"]):
            known = self._parts[index] = _Parts(group["params"], self._by_parameter)
        return [
            {**group, "params": parameters, "lr": group["lr"] if factor == 1.0 else group["lr"] * factor}
            for factor, parameters in known.by_factor.items()
        ]

    def _after_step(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        for group, part in self._counted:
            group |= {key: value for key, value in part.items() if key not in ("params", "lr")}
        self.restore(optimizer)

    def restore(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        """Gives the user's groups back; called after each step, and by whoever catches a step that raised."""
        self._counted = []
        if self._saved is not None:
            optimizer.param_groups = self._saved
            self._saved = None
