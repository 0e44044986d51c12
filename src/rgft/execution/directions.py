"""The step an optimizer makes, at reference learning rate: Δθ without multiplier, schedule or decay.

Signals compare components by what a step of equal learning rate would do, so that no component is rewarded for its own
multiplier. Of Adam, AdamW and SGD with momentum the direction is read off the state. Of others the state does not tell
it: there the optimizer steps a copy (`rgft.optimizer.dry_step`), and of steps that are made the rows that will be
looked at are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from rgft.blocks import Rows, RowSample
from rgft.errors import OptimizerError
from rgft.execution.optimizers import is_elementwise
from rgft.optimizer.dry_step import dry_step
from rgft.optimizer.muon import MuonAdamW, is_muon

#: Parameter (by identity) → first row → every so many rows from there on, of the last step's direction.
Kept = dict[int, dict[int, Tensor]]


class Directions:
    """Steps of an optimizer. Tensors returned are new and detached.

    Attributes:
        seconds: that keeping steps has taken.

    Raises:
        OptimizerError: its step cannot be made of a parameter alone.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.seconds = 0.0
        self._groups: dict[int, dict[str, Any]] = {}
        self._listed: tuple[list[dict[str, Any]], int] | None = None  # what `_groups` was made of
        self._elementwise = is_elementwise(optimizer)
        self._sample: tuple[int, tuple[int, ...]] | None = None  # of the step that comes: row stride, and turns
        self._kept: Kept = {}
        self._spoilt: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        if not reads_steps(optimizer):
            self._try()
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def detach(self) -> None:
        """Takes its hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _try(self) -> None:
        """A dry step of the smallest parameter, so that what cannot work fails here."""
        optimizer = self._optimizer
        pairs = [
            (p, g) for g in optimizer.param_groups if not _reads_state(optimizer, g) for p in g["params"] if p.numel()
        ]
        if not pairs:
            return
        parameter, group = min(pairs, key=lambda pair: pair[0].numel())
        reason = "all parameters make one step together" if isinstance(optimizer, SparseAdam) else None
        try:
            if reason is None:
                dry_step(optimizer, group, parameter, torch.zeros_like(parameter))
                return
        except Exception as error:  # whatever somebody's optimizer raises
            reason = f"a step of one parameter fails ({type(error).__name__}: {error})"
        raise OptimizerError(
            f"the signal needs the step that {type(optimizer).__name__} would make of each parameter, and {reason}. "
            "Use another optimizer, e.g. AdamW, or a signal without steps, e.g. signal='grad_norm'"
        )

    def is_rowwise(self, parameter: Tensor) -> bool:
        """Whether rows of a parameter can be stepped on their own."""
        group = self._group(parameter)
        return self._elementwise or (group is not None and _reads_state(self._optimizer, group))

    def _group(self, parameter: Tensor) -> dict[str, Any] | None:
        groups = self._optimizer.param_groups  # others once a state was loaded
        count = sum(len(group["params"]) for group in groups)
        if self._listed is None or self._listed[0] is not groups or self._listed[1] != count:
            self._groups = {id(p): group for group in groups for p in group["params"]}
            self._listed = groups, count
        return self._groups.get(id(parameter))

    # ---------------------------------------------------------------- steps that are made

    def keep_next(self, stride: int, turns: Collection[int]) -> None:
        """Before a step: what will be asked of it by `last`, every `stride`-th row from these turns on.

        Steps are kept until the next one; without a call nothing is kept of it.
        """
        self._sample = (stride, tuple(turns))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._kept, self._spoilt = {}, []
        if self._sample is None:
            return
        started, (stride, turns) = time.perf_counter(), self._sample
        for group in optimizer.param_groups:
            if _reads_state(self._optimizer, group):
                continue
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and not gradient.is_sparse:
                    self._keep(parameter, gradient, group, [RowSample(stride=stride, turn=turn) for turn in turns])
        self.seconds += time.perf_counter() - started

    def _keep(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], samples: Sequence[RowSample]) -> None:
        optimizer, kept = self._optimizer, self._kept.setdefault(id(parameter), {})
        spoils = False
        stride = samples[0].factor(parameter)
        starts = sorted({sample.turn % stride for sample in samples})
        if self._elementwise and stride > 1:
            for start in starts:
                rows = slice(start, None, stride)
                made = dry_step(optimizer, group, parameter, gradient[rows], rows)
                kept[start], spoils = made.direction, spoils or made.spoils_gradient
        else:
            made = dry_step(optimizer, group, parameter, gradient)
            kept |= {start: made.direction[start::stride].clone() if stride > 1 else made.direction for start in starts}
            spoils = made.spoils_gradient
        if spoils:
            self._spoilt.append((parameter, gradient.clone()))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._sample = None
        for parameter, gradient in self._spoilt:  # which is scored after the step
            if parameter.grad is not None:
                parameter.grad.copy_(gradient)
        self._spoilt = []

    def last(self, parameter: Tensor, scale: float = 1.0, rows: Rows = ..., *, stride: int = 1) -> Tensor | None:
        """Direction −Δθ/η of the step just made, times `scale`; None before the parameter's first step.

        Args:
            parameter: whose step.
            scale: factor.
            rows: the part of it that is wanted.
            stride: of the sample that the rows are of.
        """
        group, state = self._group(parameter), self._optimizer.state.get(parameter)
        if group is None or not state:
            return None
        if not _reads_state(self._optimizer, group):
            kept = self._kept.get(id(parameter))
            return None if kept is None else _rows_of(kept, rows, stride, scale)
        if "exp_avg" in state:
            second = _second(state, group)[rows]
            return _adam(state["exp_avg"][rows], second, float(state["step"]), group, scale)
        buffer = state.get("momentum_buffer")
        return None if buffer is None else buffer[rows] * scale

    # ---------------------------------------------------------------- steps that would be made

    @torch.no_grad()
    def would_make(
        self, parameter: Tensor, gradient: Tensor, scale: float = 1.0, rows: Rows = ...
    ) -> Tensor | None:  # fmt: skip
        """Direction of the step that `gradient` would make from the moments kept, times `scale`.

        The state is not changed.

        Args:
            parameter: whose step.
            gradient: of those `rows`.
            scale: factor.
            rows: the part of it that is wanted; all, where `is_rowwise` says no.
        """
        group = self._group(parameter)
        if group is None:
            return None
        if not _reads_state(self._optimizer, group):
            return dry_step(self._optimizer, group, parameter, gradient, rows).direction.mul_(scale)
        state = self._optimizer.state.get(parameter) or {}
        if "betas" not in group:
            momentum, buffer = group.get("momentum", 0.0), state.get("momentum_buffer")
            return gradient * scale if buffer is None else (gradient + momentum * buffer[rows].to(gradient)).mul_(scale)
        beta1, beta2 = group["betas"]
        if "exp_avg" not in state:
            return _adam((1 - beta1) * gradient, (1 - beta2) * gradient.square(), 1.0, group, scale)
        first = torch.lerp(state["exp_avg"][rows].to(gradient), gradient, 1 - beta1)
        second = state["exp_avg_sq"][rows].to(gradient).mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if group.get("amsgrad"):
            second = torch.maximum(second, state["max_exp_avg_sq"][rows].to(gradient))
        return _adam(first, second, float(state["step"]) + 1.0, group, scale)

    # ---------------------------------------------------------------- saving

    def state_dict(self, names: Mapping[int, str]) -> dict[str, dict[int, Tensor]]:
        """What is kept of the last step.

        Args:
            names: identity of a parameter → what to call it.
        """
        return {names[key]: dict(kept) for key, kept in self._kept.items() if key in names}

    def load_state_dict(self, state: Mapping[str, Mapping[int, Tensor]], parameters: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`; `parameters` by the same names."""
        self._kept = {
            id(parameters[name]): {start: rows.to(parameters[name].device) for start, rows in kept.items()}
            for name, kept in state.items()
        }


def reads_steps(optimizer: Optimizer) -> bool:
    """Whether its state tells the step that it has made, of every parameter."""
    return all(_reads_state(optimizer, group) for group in optimizer.param_groups)


def _reads_state(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if isinstance(optimizer, MuonAdamW):
        return not is_muon(optimizer, group)
    if isinstance(optimizer, SGD):
        return bool(group["momentum"]) and not group["nesterov"]
    return isinstance(optimizer, Adam | AdamW)


def _rows_of(kept: Mapping[int, Tensor], rows: Rows, stride: int, scale: float) -> Tensor | None:
    """Rows of what was kept, every `stride`-th from some start on; None where these were not."""
    if stride == 1:
        return kept[0][rows] * scale
    if isinstance(rows, Tensor):  # on the CPU alone, see `rgft.blocks.rows_with_gradient`
        if not rows.numel():
            return next(iter(kept.values()))[:0] * scale
        start = int(rows[0]) % stride
        return kept[start][(rows - start) // stride] * scale if start in kept else None
    assert isinstance(rows, slice)
    assert rows.step == stride
    start = rows.start % stride
    if start not in kept:
        return None
    length = -(-(rows.stop - rows.start) // stride)
    first = rows.start // stride
    return kept[start][first : first + length] * scale


def _second(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    return state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]


@torch.no_grad()
def _adam(first: Tensor, second: Tensor, step: float, group: dict[str, Any], scale: float) -> Tensor:
    """scale · (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε), in as few passes over memory as it takes."""
    if scale == 0.0:
        return torch.zeros_like(first)
    beta1, beta2 = group["betas"]
    factor = (1.0 - beta1**step) / scale
    root = math.sqrt(1.0 - beta2**step)
    denominator = second.sqrt().mul_(factor / root).add_(group["eps"] * factor)
    return torch.div(first, denominator, out=denominator)
