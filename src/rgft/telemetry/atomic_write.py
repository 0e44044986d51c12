"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from rgft.errors import RunFolderError

#: Names of files that are being written, as a glob pattern.
TEMPORARY = ".*.tmp"


def write_all(descriptor: int, data: Any) -> int:
    """Writes all bytes of `data`; the system may take them in several goes. Returns their number."""
    rest = memoryview(data).cast("B")
    size = len(rest)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    return size


class _Watched(io.RawIOBase):
    """A file to write to that remembers the system's error: whoever writes may hide it behind one of its own."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        try:
            return write_all(self._descriptor, data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.RawIOBase]:
    """A file to write to; it takes the place of `path` when the block ends without an error.

    It is written in the same folder, brought to disk, then renamed. Until then the old file stands; after an error it
    still does, and nothing is left beside it.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    watched: _Watched | None = None
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            watched = _Watched(descriptor)
            yield watched
            if watched.error is not None:
                raise watched.error
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        cause = error if watched is None or watched.error is None else watched.error
        if isinstance(cause, OSError) and not isinstance(cause, RunFolderError):
            raise write_error(path, cause) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the place of `path` when the block ends without an error.

    Until then an old folder stands; after an error it still does, and nothing is left beside it.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for item in temporary.rglob("*"):
            if item.is_file():
                _sync_file(item)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:
        # Writers in other languages (safetensors) raise errors of their own, with the system's text in them.
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if os.strerror(errno.ENOSPC) in str(error) else None
        cause = error if isinstance(error, OSError) else full
        if cause is not None and not isinstance(cause, RunFolderError):
            raise write_error(path, cause) from error
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the content of `path` atomically. Raises RunFolderError as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def is_full(error: OSError) -> bool:
    """Whether a write failed because no space was left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_error(path: Path, error: OSError) -> RunFolderError:
    """The error to raise for a failed write: what, where, and what to do."""
    if is_full(error):
        what = "the disk is full (or a quota is used up); what was written before is intact. Free some space and resume"
    else:
        what = f"it could not be written: {error.strerror or error}"
    failure = RunFolderError(f"{path}: {what}")
    failure.errno = cast("int", error.errno)
    return failure


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Brings a rename in `folder` to disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
