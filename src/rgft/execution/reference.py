"""The masked reference: dense backward of the plain model, then slicing and masking. Slow, and true by construction.

It defines what every fast path must give, and works wherever views cannot be. Nothing here shares memory with the
model, knows a module's type or saves any work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.components import Partition

#: Component name → one tensor per slice, in the order of `Component.slices`; None where no gradient arrived.
SlicedTensors = dict[str, tuple[Tensor | None, ...]]


def reference_gradients(model: nn.Module, partition: Partition, loss: Callable[[nn.Module], Tensor]) -> SlicedTensors:
    """Gradients of the loss by component: all of them, whatever is frozen now.

    Args:
        model: plain, not bound. Its gradients and flags are left as they were.
        partition: of this model.
        loss: the scalar to differentiate.

    Returns:
        Per component, a contiguous copy of its slice of each dense gradient.
    """
    live = dict(model.named_parameters())
    wanted = list(dict.fromkeys(part.parameter for component in partition for part in component.slices))
    flags = {name: live[name].requires_grad for name in wanted}
    try:
        for name in wanted:
            live[name].requires_grad_(True)
        dense = torch.autograd.grad(loss(model), [live[name] for name in wanted], allow_unused=True)
    finally:
        for name, flag in flags.items():
            live[name].requires_grad_(flag)
    by_name = dict(zip(wanted, dense, strict=True))

    def sliced(name: str, part: Any) -> Tensor | None:
        gradient = by_name[name]
        return None if gradient is None else part.of(gradient).clone(memory_format=torch.contiguous_format)

    return {c.name: tuple(sliced(part.parameter, part) for part in c.slices) for c in partition}


class ReferenceUpdate:
    """Training by the reference: each slice has a detached copy that an optimizer steps, written back afterwards.

    Args:
        model: plain, not bound; stepped in place.
        partition: of this model.
        make_optimizer: from param groups `{"params": [...], "component": name}` to the optimizer.

    Attributes:
        optimizer: over the copies, which stay the same objects, so its state is kept as any optimizer keeps it.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, make_optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    ) -> None:
        self._model = model
        self._partition = partition
        live = dict(model.named_parameters())
        self._copies: dict[str, list[nn.Parameter]] = {
            component.name: [
                nn.Parameter(part.of(live[part.parameter].detach()).clone(memory_format=torch.contiguous_format))
                for part in component.slices
            ]
            for component in partition
        }
        self.optimizer = make_optimizer(
            [{"params": copies, "component": name} for name, copies in self._copies.items()]
        )

    def step(self, loss: Callable[[nn.Module], Tensor], active: Collection[str] | Mapping[str, float]) -> None:
        """One optimizer step of the active components; all others keep every bit, and their moments.

        Args:
            loss: of the step's batch.
            active: names, or names with their learning-rate multipliers.
        """
        multipliers = active if isinstance(active, Mapping) else dict.fromkeys(active, 1.0)
        gradients = reference_gradients(self._model, self._partition, loss)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            name = group["component"]
            for copy, gradient in zip(group["params"], gradients[name], strict=True):
                copy.grad = gradient if name in multipliers else None
            group["lr"] = group["lr"] * multipliers.get(name, 1.0)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._write_back(multipliers)

    @torch.no_grad()
    def _write_back(self, active: Collection[str]) -> None:
        live = dict(self._model.named_parameters())
        for component in self._partition:
            if component.name in active:
                for part, copy in zip(component.slices, self._copies[component.name], strict=True):
                    part.of(live[part.parameter]).copy_(copy)
