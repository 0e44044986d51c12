"""AdamW that steps a small stand-in of each matrix in its place: some of its entries, or a projection.

Moments are kept of the stand-in alone, as the papers publish it; all else (classifier, norms, tables) is AdamW's own.
The gradient of the whole matrix is made all the same: that is these methods' true cost.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rgft.errors import ConfigError
from rgft.optimizer.adamw import WITH_FUSED_KERNEL
from rgft.optimizer.muon import IS_MATRIX

#: Keys of a matrix's state that are AdamW's, of its stand-in.
COUNT, MOMENTS = "step", ("exp_avg", "exp_avg_sq")


class StandInAdamW(Optimizer):
    """Steps groups with `is_matrix` by stand-ins, and the others by torch's AdamW.

    Args:
        params: groups, as `Guide.param_groups(by="matrix")` makes them.
        lr, weight_decay: of groups without.
        betas, eps: of AdamW.

    Raises:
        ConfigError: no group has matrices.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self._adamw = AdamW([nn.Parameter(torch.zeros(1))], lr=lr, betas=betas, eps=eps)
        super().__init__(params, {**self._adamw.defaults, "weight_decay": weight_decay, IS_MATRIX: False})
        for group in self.param_groups:
            if not group[IS_MATRIX]:
                group["fused"] = all(p.device.type in WITH_FUSED_KERNEL for p in group["params"])
        if not self.matrices:
            raise ConfigError(
                f"{type(self).__name__}: expected matrices in the model's layers that train, found none: all else is "
                "plain AdamW's; leave this method out on this model"
            )

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that have stand-ins."""
        return [p for group in self.param_groups if group[IS_MATRIX] for p in group["params"]]

    @property
    def steps_made(self) -> int:
        """Number of steps so far."""
        states = (self.state[matrix] for matrix in self.matrices if matrix in self.state)
        return max((int(state[COUNT]) for state in states if COUNT in state), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group[IS_MATRIX]]
        self._adamw.step()
        groups = [group for group in self.param_groups if group[IS_MATRIX]]
        self._prepare([p for group in groups for p in group["params"] if p.grad is not None])
        for group in groups:
            self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        stand_ins = {p: nn.Parameter(self._value(p)) for p in group["params"] if p.grad is not None}
        for p, stand_in in stand_ins.items():
            stand_in.grad = self._gradient(p)
        self._adamw.state = defaultdict(dict)
        for p, stand_in in stand_ins.items():
            known = self.state[p]
            self._adamw.state[stand_in] = {key: known[key] for key in (COUNT, *MOMENTS) if key in known}
        self._adamw.param_groups = [{**group, "params": list(stand_ins.values())}]
        self._adamw.step()
        for p, stand_in in stand_ins.items():
            self.state[p] |= self._adamw.state[stand_in]
            self._write(p, stand_in.detach(), group)

    @abstractmethod
    def _prepare(self, matrices: list[nn.Parameter]) -> None:
        """Before the matrices with gradients are stepped."""

    @abstractmethod
    def _value(self, matrix: nn.Parameter) -> Tensor:
        """The stand-in before the step."""

    @abstractmethod
    def _gradient(self, matrix: nn.Parameter) -> Tensor:
        """Its gradient."""

    @abstractmethod
    def _write(self, matrix: nn.Parameter, value: Tensor, group: dict[str, Any]) -> None:
        """Puts the stand-in's value after the step to use."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`; integers stay integers, which torch would make floats of."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for p, number in zip(parameters, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and not value.is_floating_point():
                    self.state[p][key] = value.to(p.device, copy=True)
