"""What autograd would save of a forward pass, by how deep a cut would have to be to spare it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes that one training pass saves for backward, weights excluded, each storage once.

    Attributes:
        by_last_use: bytes by the highest depth that needs them: what a cut there or below still has to save.
        by_layer: bytes first saved in each layer: what checkpointing computes again, a layer at a time.
        largest: of a single tensor.
        hidden: of the last layer's output.
    """

    by_last_use: tuple[int, ...]
    by_layer: tuple[int, ...]
    largest: int
    hidden: int = 0

    def above(self, cut: int) -> int:
        """Bytes saved when backward stops at the depth `cut`."""
        return sum(self.by_last_use[cut:])


def saved_activations(
    model: nn.Module, layers: Sequence[str], forward: Callable[[], Tensor]
) -> SavedActivations:  # fmt: skip
    """Counts what a forward pass would save, without keeping it: no backward pass is possible, and none is made.

    So it takes the memory of inference, whatever it says of training.

    Args:
        model: in the mode to be looked at, what is trained requiring gradients.
        layers: paths, in forward order; depth d is layer d−1, depth 0 what runs before, n+1 what runs after.
        forward: a training forward pass, to the loss.
    """
    count = _Count(model, len(layers))
    modules = [model.get_submodule(path) for path in layers]
    handles = [module.register_forward_pre_hook(count.enters(depth)) for depth, module in enumerate(modules, start=1)]
    if modules:
        handles.append(modules[-1].register_forward_hook(count.leaves))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count.pack, _never):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return count.result()


class _Count:
    def __init__(self, model: nn.Module, layers: int) -> None:
        self._depth, self._layers, self._hidden = 0, layers, 0
        # A weak reference keeps an address from being given to another storage.
        self._references: list[StorageWeakRef] = []
        self._weights = self._known([*model.parameters(), *model.buffers()])
        self._sizes: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def _known(self, tensors: Iterable[Tensor]) -> set[int]:
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def enters(self, depth: int) -> Callable[..., None]:
        def note(module: nn.Module, args: Any) -> None:
            self._depth = max(self._depth, depth)

        return note

    def leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = self._layers + 1
        hidden = output[0] if isinstance(output, tuple) else output
        self._hidden = hidden.nbytes if isinstance(hidden, Tensor) else 0

    def pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._weights:
            return
        if identity not in self._sizes:
            self._references.append(StorageWeakRef(storage))
            self._sizes[identity], self._first[identity] = storage.nbytes(), self._depth
        self._last[identity] = self._depth

    def result(self) -> SavedActivations:
        last, first = [0] * (self._layers + 2), [0] * (self._layers + 2)
        for identity, size in self._sizes.items():
            last[self._last[identity]] += size
            first[self._first[identity]] += size
        return SavedActivations(
            by_last_use=tuple(last),
            by_layer=tuple(first[1:-1]),
            largest=max(self._sizes.values(), default=0),
            hidden=self._hidden,
        )


def _never(packed: None) -> Tensor:
    raise RuntimeError("nothing was saved: this pass was made to be counted, and has no backward pass")
