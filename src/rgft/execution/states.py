"""Hidden states of examples at a cut: how they are stored, and the store in memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: What an example is known by: its id, or (on disk) a digest of its content.
Key = Hashable


@dataclass(frozen=True, kw_only=True)
class CachedState:
    """Hidden states of one example at the cut, as stored.

    Attributes:
        values: [T, …] without padding; of the stored type.
        scale_T1: factors of the tokens' values, where these are integers; else None.
        offset: position of the first token in its row; positions are absolute in some models, so it must recur.
        tokens: length of the row, padding included, where no mask told the tokens from it: then that must recur too.
    """

    values: Tensor
    scale_T1: Tensor | None = None
    offset: int
    tokens: int | None = None

    @classmethod
    def of(cls, states: Tensor, dtype: torch.dtype | None, *, offset: int, tokens: int | None) -> CachedState:
        """Encodes states.

        Args:
            states: [T, …].
            dtype: to store; None: as they are, exactly; int8: with a scale per token, its largest magnitude / 127.
            offset, tokens: see the class.
        """
        if dtype is not torch.int8:
            values = states.detach().to("cpu", dtype or states.dtype, copy=True)
            return cls(values=values, offset=offset, tokens=tokens)
        flat = states.detach().float().flatten(1)
        scale = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        values = (flat / scale).round().to(torch.int8).reshape(states.shape)
        return cls(values=values.cpu(), scale_T1=scale.cpu(), offset=offset, tokens=tokens)

    def decoded(self, like: Tensor) -> Tensor:
        """The states, with the device and type of `like`."""
        if self.scale_T1 is None:
            return self.values.to(like.device, like.dtype)
        flat = self.values.flatten(1).to(like.device, torch.float32)
        return (flat * self.scale_T1.to(like.device)).reshape(self.values.shape).to(like.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale_T1 is None else self.scale_T1.nbytes)

    def error(self, states: Tensor) -> float:
        """The largest error of a token, ‖x̂ − x‖ / ‖x‖."""
        if not states.numel():
            return 0.0
        exact = states.detach().double().flatten(1)
        norms = torch.linalg.vector_norm(exact, dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        distances = torch.linalg.vector_norm(self.decoded(states).double().reshape(exact.shape) - exact, dim=1)
        return float((distances / norms).max())


class States(Protocol):
    """States of one cut, by example. What does not fit is not stored: all examples recur alike, none is staler."""

    def open(self, fingerprint: str) -> None:
        """Begins with another cut or other weights, named by `fingerprint`: nothing of the old is found any more."""
        ...

    def get(self, key: Key) -> CachedState | None: ...
    def put(self, key: Key, state: CachedState) -> bool:
        """Stores, replacing an older state; False where there is no room."""
        ...

    def __contains__(self, key: Key) -> bool: ...
    def __len__(self) -> int: ...

    @property
    def bytes(self) -> int:
        """Bytes of the stored states."""
        ...

    def close(self) -> None: ...


class MemoryStates:
    """States in memory.

    Args:
        max_bytes: what does not fit is not stored.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._states: dict[Key, CachedState] = {}
        self._bytes = 0

    def limit(self, max_bytes: int) -> None:
        """Bounds what is stored from here on; what is there stays until the next `open`."""
        self._max_bytes = max_bytes

    def open(self, fingerprint: str) -> None:
        self._states.clear()
        self._bytes = 0

    def get(self, key: Key) -> CachedState | None:
        return self._states.get(key)

    def put(self, key: Key, state: CachedState) -> bool:
        known = self._states.get(key)
        total = self._bytes + state.nbytes - (0 if known is None else known.nbytes)
        if total > self._max_bytes:
            return False
        self._bytes = total
        self._states[key] = state
        return True

    def drop(self, key: Key) -> None:
        """Forgets an example's states, if there are any."""
        self._bytes -= self.size_of(key)
        self._states.pop(key, None)

    def size_of(self, key: Key) -> int:
        """Bytes of an example's states."""
        state = self._states.get(key)
        return 0 if state is None else state.nbytes

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[tuple[Key, CachedState]]:
        return iter(self._states.items())

    @property
    def bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        """Nothing to close."""
