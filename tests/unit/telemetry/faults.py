"""Things going wrong on purpose: a process that dies in the middle, a disk that fills up."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

_write = os.write


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; returns 0 when it ended, −9 when it was killed, 1 when it raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    """As `kill -9` or the out-of-memory killer: no handler, no flush, no `finally`."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_writing(count: int) -> None:
    """From now on, this process writes `count` more bytes and dies."""
    left = count

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        done = _write(descriptor, bytes(data)[:left])
        left -= done
        if left == 0:
            die()
        return done

    os.write = write


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From now on, the disk takes `count` more bytes; then it is full."""
    left = count

    def write(descriptor: int, data: Any) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = _write(descriptor, bytes(data)[:left])
        left -= done
        return done

    monkeypatch.setattr(os, "write", write)
