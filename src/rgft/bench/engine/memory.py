"""Memory of a training step, by what holds it; the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes held at the height of a step: weights; gradients; optimizer state; activations saved for backward."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def step_memory(model: nn.Module, optimizer: Optimizer, step: Callable[[], None]) -> StepMemory:
    """Measures one step (which it makes).

    Storages are counted once, however many views or graph nodes hold them; activations are what autograd saves
    beyond weights. Optimizer state is counted after the step.
    """
    weights = _storages([*model.parameters(), *model.buffers()])
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # storages must stay alive, or an address may come up twice
    gradients: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in saved:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients.update(_storages(held))

    handle = optimizer.register_step_pre_hook(before)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
    finally:
        handle.remove()
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return StepMemory(
        weights=sum(weights.values()), gradients=sum(gradients.values()), moments=sum(_storages(state).values()),
        activations=sum(saved.values()),
    )  # fmt: skip


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of each distinct storage."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
