"""Muon for matrices of hidden layers, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from rgft.optimizer.adamw import WITH_FUSED_KERNEL

#: Key of a group: whether Muon steps its parameters.
IS_MATRIX = "is_matrix"


class MuonAdamW(Optimizer):
    """Steps groups with `is_matrix` by torch's Muon and the others by torch's AdamW, which share its groups and state.

    One optimizer, so that schedules, state and what is hooked to a step are as of any other. Muon's steps are scaled to
    the root mean square of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate
    and decay suit both.

    Args:
        params: groups; `is_matrix` is False where it is missing.
        lr, weight_decay: of groups without.
        betas, eps: of AdamW.
        momentum, ns_steps: of Muon.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, momentum: float = 0.95, ns_steps: int = 5,
    ) -> None:  # fmt: skip
        unused = [nn.Parameter(torch.zeros(1, 1))]  # theirs are given to them at each step
        self._muon = Muon(unused, lr=lr, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(unused, lr=lr, betas=betas, eps=eps)
        # A group has the settings of both. What both know (lr, eps, …) is AdamW's, but for Muon's own epsilon.
        defaults = {**self._muon.defaults, **self._adamw.defaults, "weight_decay": weight_decay, IS_MATRIX: False}
        super().__init__(params, defaults)
        for group in self.param_groups:
            if not group[IS_MATRIX]:
                group["fused"] = all(p.device.type in WITH_FUSED_KERNEL for p in group["params"])
            else:
                group["eps"] = self._muon.defaults["eps"]
                if wrong := [tuple(p.shape) for p in group["params"] if p.dim() != 2]:
                    raise ValueError(f"Muon steps matrices; found a parameter of shape {wrong[0]} in its group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, is_matrix in ((self._muon, True), (self._adamw, False)):
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group[IS_MATRIX] is is_matrix]
            inner.step()
        return loss


def newton_schulz_flops(shape: Sequence[int], steps: int) -> float:
    """FLOPs of the products in which Muon orthogonalises a matrix: X Xᵀ, its square, and that times X."""
    short, long = sorted(shape)
    return steps * (4.0 * short * short * long + 2.0 * short**3)


def muon_flops(optimizer: Optimizer) -> dict[int, float]:
    """Identity of each parameter that Muon steps → FLOPs of its products in a step; empty for other optimizers."""
    return {
        id(p): newton_schulz_flops(p.shape, group["ns_steps"])
        for group in optimizer.param_groups
        if is_muon(optimizer, group)
        for p in group["params"]
    }


def is_muon(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether Muon steps the parameters of a group."""
    return isinstance(optimizer, Muon) or (isinstance(optimizer, MuonAdamW) and group[IS_MATRIX])
