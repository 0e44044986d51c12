"""Weights of schedule-free optimizers: while training the point where gradients are taken (y), else the mean (x).

The libraries' own `eval()` and `train()` go from one to the other and back by arithmetic, which leaves the last bits
changed, and do so for every parameter. Here what was trained is put back as it was, and components that are off keep
every bit: those above them have been trained on the weights that they stopped at, which the activation cache holds too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.execution.low_rank import LowRank
from rgft.execution.optimizers import counts_in_groups
from rgft.execution.pair_set import couples


class MeanOfIterates:
    """Makes an optimizer's `eval()` and `train()` exact, and apply to what is on alone, until `detach`.

    Args:
        optimizer: schedule-free, in training mode or before its first step.
        is_on: whether a parameter is of a component that is on.
    """

    def __init__(self, optimizer: Optimizer, is_on: Callable[[nn.Parameter], bool]) -> None:
        self._optimizer, self._is_on = optimizer, is_on
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        optimizer.__dict__["eval"], optimizer.__dict__["train"] = self.show, self.hide
        optimizer.train()  # type: ignore[attr-defined]

    @classmethod
    def of(cls, optimizer: Optimizer, is_on: Callable[[nn.Parameter], bool]) -> MeanOfIterates | None:
        """None for optimizers that keep no mean."""
        return cls(optimizer, is_on) if counts_in_groups(optimizer) else None

    @torch.no_grad()
    def show(self) -> None:
        """The model has the mean; what it had is kept."""
        for group in self._groups(shown=False):
            for parameter in group["params"]:
                steps_of = self._optimizer.state.get(parameter, {}).get("z")
                if steps_of is not None and self._is_on(parameter):
                    self._kept.append((parameter, parameter.detach().clone()))
                    parameter.lerp_(end=steps_of.to(parameter), weight=1.0 - 1.0 / _interpolation(group))
            group["train_mode"] = False

    @torch.no_grad()
    def hide(self) -> None:
        """The model has what is trained, bit for bit; computed where only the mean is known (saved so by others)."""
        kept = {id(parameter): value for parameter, value in self._kept}
        self._kept = []
        for group in self._groups(shown=True):
            for parameter in group["params"]:
                steps_of = self._optimizer.state.get(parameter, {}).get("z")
                if id(parameter) in kept:
                    parameter.copy_(kept[id(parameter)])
                elif steps_of is not None and self._is_on(parameter):
                    parameter.lerp_(end=steps_of.to(parameter), weight=1.0 - _interpolation(group))
            group["train_mode"] = True

    @torch.no_grad()
    def before_merge(self, low_rank: LowRank, name: str) -> None:
        """Moves where steps lead (z) with the weights: they get what a component's pairs add, the pairs give it up."""
        pairs, state = low_rank.pairs[name], self._optimizer.state
        weights = low_rank.parts[low_rank.weight_part(name)]
        for weight, delta in zip(weights, low_rank.deltas(name, pairs), strict=True):
            if (steps_of := state.get(weight, {}).get("z")) is not None:
                steps_of.add_(delta.to(steps_of))
        for _, b in couples(pairs):
            if (steps_of := state.get(b, {}).get("z")) is not None:
                steps_of.zero_()

    def keep(self) -> None:
        """The end: the model has the mean, and there is no way back."""
        self.show()
        self._kept = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the mean; where it has already, nothing happens."""
        if not any(True for _ in self._groups(shown=False)):
            yield
            return
        self.show()
        try:
            yield
        finally:
            self.hide()

    def _groups(self, *, shown: bool) -> Iterator[dict[str, Any]]:
        return (group for group in self._optimizer.param_groups if group["train_mode"] is not shown)

    def detach(self) -> None:
        """Gives the optimizer its own methods back."""
        for name in ("eval", "train"):
            self._optimizer.__dict__.pop(name, None)


def _interpolation(group: dict[str, Any]) -> float:
    """How near to the mean gradients are taken: y = (1 − β) z + β x."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])
