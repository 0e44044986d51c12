"""Cached states of several cuts: those at the cut, and those of lower cuts that it was deepened from.

When the cut moves up, what was stored at the old one stays right, since nothing below it has moved. An example that is
known there alone is computed from there on, once, and then is known at the new cut instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rgft.execution.disk_states import DiskStates
from rgft.execution.states import CachedState, Key, MemoryStates, States


class Level:
    """States at one cut.

    Attributes:
        cut: whose output they are.
        states: by key.
        is_padding_unread: whether it was shown, at this cut, that the loss does not depend on states of padding. Rows
            with padding are read only then.
    """

    def __init__(self, cut: int, states: States) -> None:
        self.cut, self.states = cut, states
        self.is_padding_unread = False


class CacheLevels:
    """All cuts of which states are kept, the highest first.

    Args:
        folder: where states are kept on disk; None: in memory.
        max_bytes: of all levels together in memory, or of the folder.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._levels: list[Level] = []
        if folder is not None:
            DiskStates(folder, max_bytes)  # refuses a folder that cannot be written, before anything is computed

    @property
    def is_on_disk(self) -> bool:
        return self._folder is not None

    @property
    def bytes(self) -> int:
        """Bytes of all stored states."""
        return sum(level.states.bytes for level in self._levels)

    def limit(self, max_bytes: int) -> None:
        """Bounds levels in memory from here on; those on disk stay as they are."""
        self._max_bytes = max_bytes if self._folder is None else self._max_bytes

    def move(self, cut: int, fingerprint: Callable[[], str]) -> bool:
        """Makes `cut` the highest level; returns whether any state is left.

        Higher ones are dropped, since what lies between may train now. Below 2 nothing is kept.

        Args:
            cut: the new one.
            fingerprint: of what states on disk depend on.
        """
        kept = [level for level in self._levels if 1 < level.cut <= cut]
        for level in self._levels:
            if level not in kept:
                level.states.close()
        self._levels = kept
        if cut > 1 and (not kept or kept[0].cut != cut):
            states: States
            if self._folder is None:
                states = MemoryStates(self._max_bytes)
            else:
                states = DiskStates(self._folder, self._max_bytes)
            states.open(fingerprint() if self.is_on_disk else "")
            self._levels.insert(0, Level(cut, states))
        return bool(kept)

    def close(self) -> None:
        for level in self._levels:
            level.states.close()

    @property
    def top(self) -> Level | None:
        """The level of the cut."""
        return self._levels[0] if self._levels else None

    def find(self, key: Key, *, is_padded: bool, fits: Callable[[CachedState], bool]) -> tuple[int, CachedState] | None:
        """The highest cut at which an example is known, and its states there.

        Args:
            key: of the example.
            is_padded: whether the batch has padding.
            fits: whether states are those of the example's place in its row.
        """
        for level in self._levels:
            if is_padded and not level.is_padding_unread:
                continue
            state = level.states.get(key)
            if state is not None and fits(state):
                return level.cut, state
        return None

    def read_ahead(self, keys: Collection[Key]) -> None:
        """Begins to read examples from disk, each at the highest cut at which it is known."""
        for level in self._levels:
            if isinstance(level.states, DiskStates):
                level.states.read_ahead([key for key in keys if key in level.states])
                keys = [key for key in keys if key not in level.states]

    def put(self, key: Key, state: CachedState) -> bool:
        """Stores states at the cut, in place of those of lower cuts; False where there is no room."""
        top, *lower = self._levels
        if isinstance(top.states, MemoryStates):
            replaced = [level.states for level in lower if isinstance(level.states, MemoryStates)]
            top.states.limit(self._max_bytes - sum(states.bytes - states.size_of(key) for states in replaced))
            if not top.states.put(key, state):
                return False
            for states in replaced:
                states.drop(key)
            self._levels = [top, *(level for level in lower if len(level.states))]
            return True
        return top.states.put(key, state)

    def state_dict(self) -> list[dict[str, Any]]:
        """All levels, the lowest first, with what they hold in memory (on disk it stays there)."""
        levels: list[dict[str, Any]] = []
        for level in reversed(self._levels):
            held = list(level.states) if isinstance(level.states, MemoryStates) else []
            levels.append(
                {
                    "cut": level.cut,
                    "is_padding_unread": level.is_padding_unread,
                    "ids": [key for key, _ in held],
                    "offsets": [state.offset for _, state in held],
                    "tokens": [state.tokens for _, state in held],
                    "states": [state.values for _, state in held],
                    "scales": [state.scale_T1 for _, state in held],
                }
            )
        return levels

    @staticmethod
    def restore(level: Level, data: Mapping[str, Any]) -> None:
        """Fills a level that was just opened with what `state_dict` has of it."""
        level.is_padding_unread = data["is_padding_unread"]
        columns = (data[name] for name in ("ids", "states", "scales", "offsets", "tokens"))
        for key, values, scale_T1, offset, tokens in zip(*columns, strict=True):
            level.states.put(key, CachedState(values=values, scale_T1=scale_T1, offset=offset, tokens=tokens))
