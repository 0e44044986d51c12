"""What tests of states on disk share."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rgft.execution.disk_states import DiskStates
from rgft.execution.states import CachedState


def threads_that_load(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that records are read in, one for each from here on."""
    threads: list[str] = []
    load = DiskStates._load

    def noted(self: DiskStates, *args: Any) -> CachedState:
        threads.append(threading.current_thread().name)
        return load(self, *args)

    monkeypatch.setattr(DiskStates, "_load", noted)
    return threads
