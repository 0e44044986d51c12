"""The highest memory that tensors hold while something runs; what `torch.cuda.max_memory_allocated` is on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Follows, inside, every storage from when it is made until nothing holds it.

    What kernels use for themselves while they run is not seen.

    Args:
        held: tensors that exist already.
        beside: bytes that are held throughout.

    Attributes:
        peak: bytes, the highest so far.
    """

    def __init__(self, held: Iterable[Tensor] = (), *, beside: int = 0) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._beside = self._bytes = self.peak = beside
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return
        size = storage.nbytes()
        self._live[storage._cdata] = (StorageWeakRef(storage), size)
        self._bytes += size
        if self._bytes > self.peak:
            self._forget_freed()  # asked only when it matters: there are thousands
            self.peak = max(self.peak, self._bytes)

    def _forget_freed(self) -> None:
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self._bytes = self._beside + sum(size for _, size in self._live.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                self._add(value)
        return output
