"""Hidden states on disk, shared between runs.

A folder holds one folder per fingerprint of what the states depend on (weights below the cut, cut, way of storing),
and in it one file per run that wrote: records one after the other, each with a checksum, only ever appended to.
Several runs may read and write at the same time. A record that was torn by a crash, or damaged since, is never used:
its example is computed again, and the record is marked in its file, so that later runs pass it over. Files are read at
a place, not mapped: of a file that another process cuts short, a map would end the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import secrets
import struct
import threading
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgft.errors import CacheError
from rgft.execution.states import CachedState, Key

log = logging.getLogger("rgft")

_MAGIC = b"RGF1"
_DAMAGED = b"RGFX"  # in place of the magic: a record that was found damaged; its lengths lead to the next one
_SUFFIX = ".states"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
#: Magic, key, checksum of what follows, bytes of the description, bytes of the content.
_HEADER = struct.Struct("<4s16sIIQ")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Where a state lies, and what its header said."""

    file: Path
    start: int
    checksum: int
    description: int
    content: int
    header: bytes


class DiskStates:
    """States in files below a folder, by digests of 16 bytes.

    Args:
        folder: is made where there is none; may be shared by any runs, also at the same time.
        max_bytes: of the folder. States of other fingerprints give way, those first that were used least recently; when
            that is not enough, no more is stored.

    Raises:
        CacheError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = folder, max_bytes
        self._folder: Path | None = None
        self._records: dict[Key, list[_Record]] = {}  # the last of a key is read; others only if that is damaged
        self._bytes = self._used = self._others = 0  # live content; all that its files take; other fingerprints' files
        self._readers: dict[Path, BufferedIOBase] = {}
        self._reading: dict[Key, tuple[_Record, Future[CachedState]]] = {}  # ahead of being asked for
        self._thread: ThreadPoolExecutor | None = None
        self._place = threading.Lock()  # of the readers, which two threads use
        self._writer: BufferedIOBase | None = None
        self._own: Path | None = None
        self._is_writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CacheError(
                f"execution.cache_dir: expected a folder that can be written, found {folder}: {error.strerror or error}"
            ) from error

    def open(self, fingerprint: str) -> None:
        self.close()
        self._folder = self._root / fingerprint
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)
            for path in sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: (_last_used(path), path.name)):
                for key, record in _records(path):
                    self._records.setdefault(key, []).append(record)
        except OSError as error:
            self._gives_up(error)
        self._bytes = sum(records[-1].content for records in self._records.values())
        self._used = _size(self._folder)
        self._others = sum(_size(path) for path in self._other_folders())

    def get(self, key: Key) -> CachedState | None:
        of, ahead = self._reading.pop(key, (None, None))
        while records := self._records.get(key):
            record = records[-1]
            try:
                return ahead.result() if ahead and of is record else self._load(self._reader(record.file), record)
            except (OSError, ValueError) as error:
                self._leave_out_damage(record, error)
        return None

    def read_ahead(self, keys: Collection[Key]) -> None:
        """Begins to read what will be asked for next, beside what the caller does; what was begun before is let go."""
        for _, future in self._reading.values():
            future.cancel()
        self._reading.clear()
        for key in keys:
            if key not in self._records or key in self._reading:
                continue
            record = self._records[key][-1]
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="rgft-read-ahead")
            try:
                future = self._thread.submit(self._load, self._reader(record.file), record)
            except OSError:  # said when it is asked for
                return
            self._reading[key] = record, future

    def put(self, key: Key, state: CachedState) -> bool:
        if self._folder is None or not self._is_writable or not isinstance(key, bytes):
            return False
        description, content = _encoded(state)
        size = _HEADER.size + len(description) + len(content)
        if self._used + size > self._max_bytes - self._others and not self._make_room(size):
            return False
        checksum = zlib.crc32(content, zlib.crc32(description))
        try:
            if self._writer is None:
                self._own = self._folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
                self._writer = self._own.open("ab")
            assert self._own is not None
            start = self._writer.tell()
            header = _HEADER.pack(_MAGIC, key, checksum, len(description), len(content))
            self._writer.write(header)
            self._writer.write(description)
            self._writer.write(content)
            self._writer.flush()
        except OSError as error:
            self._gives_up(error)
            return False
        records = self._records.setdefault(key, [])
        self._bytes += len(content) - (records[-1].content if records else 0)
        self._used += size
        records.append(_Record(
            file=self._own, start=start + _HEADER.size, checksum=checksum, description=len(description),
            content=len(content), header=header,
        ))  # fmt: skip
        return True

    def __contains__(self, key: Key) -> bool:
        return key in self._records

    def __len__(self) -> int:
        return len(self._records)

    @property
    def bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        """Closes the files; what was written stays for other runs."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._reading.clear()
        for file in (*self._readers.values(), *((self._writer,) if self._writer else ())):
            with contextlib.suppress(OSError):  # what a full disk did not take is torn, and left out when read
                file.close()
        self._readers.clear()
        self._records.clear()
        self._writer = self._own = self._folder = None
        self._is_writable = True
        self._bytes = self._used = self._others = 0

    def _reader(self, path: Path) -> BufferedIOBase:
        reader = self._readers.get(path)
        if reader is None:
            reader = self._readers[path] = path.open("rb")
        return reader

    def _load(self, reader: BufferedIOBase, record: _Record) -> CachedState:
        with self._place:
            reader.seek(record.start)
            data = reader.read(record.description + record.content)
        if len(data) < record.description + record.content:
            raise ValueError("it ends early")
        if zlib.crc32(data) != record.checksum:
            raise ValueError("the checksum is another")
        return _decoded(data[: record.description], data[record.description :])

    def _leave_out_damage(self, found: _Record, error: Exception) -> None:
        """Looks through the file of a record that could not be read, and leaves out all that are damaged.

        They are also marked in the file where that can be written; where not, what is computed again is in a newer file
        and found first.
        """
        lost, number = [found], 0
        for key, records in list(self._records.items()):
            of_file = [record for record in records if record.file == found.file]
            number += len(of_file)
            damaged = [record for record in of_file if record is found or not self._is_whole(record)]
            if not damaged:
                continue
            lost += [record for record in damaged if record is not found]
            self._bytes -= records[-1].content
            self._records[key] = left = [record for record in records if record not in damaged]
            if left:
                self._bytes += left[-1].content
            else:
                del self._records[key]
        if isinstance(error, ValueError):  # not where the system refused to read
            with contextlib.suppress(OSError):
                _mark(found.file, lost)
        log.warning(
            "activation cache: %d of %d records of %s are damaged (%s); their examples are computed again",
            len(lost), number, found.file, error,
        )  # fmt: skip

    def _is_whole(self, record: _Record) -> bool:
        try:
            self._load(self._reader(record.file), record)
        except (OSError, ValueError):
            return False
        return True

    def _gives_up(self, error: OSError) -> None:
        """The run goes on without storing more."""
        self._is_writable = False
        log.warning(
            "activation cache: %s cannot be written (%s); examples not stored yet are computed each time",
            self._folder, error.strerror or error,
        )  # fmt: skip

    def _make_room(self, wanted: int) -> bool:
        """Removes states of other fingerprints, least recently used first, until `wanted` bytes fit."""
        for path in sorted(self._other_folders(), key=_last_used):
            size = _size(path)
            for file in path.glob(f"*{_SUFFIX}"):
                with contextlib.suppress(OSError):
                    file.unlink()
            with contextlib.suppress(OSError):
                path.rmdir()
            self._others -= size - _size(path)
            log.info("activation cache: removed %s (%.0f MB) to make room", path, size / 1e6)
            if self._used + wanted <= self._max_bytes - self._others:
                return True
        return False

    def _other_folders(self) -> list[Path]:
        """Of the cache's own making: a user may have given a folder with other things in it."""
        return [
            path for path in self._root.iterdir()
            if path != self._folder and _FINGERPRINT.fullmatch(path.name) and path.is_dir()
        ]  # fmt: skip


def _records(path: Path) -> Iterator[tuple[bytes, _Record]]:
    """All whole records of a file that are not known to be damaged; what a crash tore off at its end is left out."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, key, checksum, description, content = _HEADER.unpack(header)
            start = file.tell()
            if magic not in (_MAGIC, _DAMAGED) or start + description + content > end:
                return
            if magic == _MAGIC:
                yield (
                    key,
                    _Record(
                        file=path,
                        start=start,
                        checksum=checksum,
                        description=description,
                        content=content,
                        header=header,
                    ),
                )
            file.seek(description + content, os.SEEK_CUR)


def _mark(path: Path, damaged: list[_Record]) -> None:
    """Marks records of a file as damaged. Lengths stay, so that what follows is still found."""
    with path.open("r+b", buffering=0) as file:
        for record in damaged:
            place = record.start - _HEADER.size
            file.seek(place)
            if file.read(_HEADER.size) == record.header:  # another run may have marked it, or cut the file short
                file.seek(place)
                file.write(_DAMAGED)


def _encoded(state: CachedState) -> tuple[bytes, bytes]:
    description = {
        "shape": list(state.values.shape), "dtype": str(state.values.dtype).removeprefix("torch."),
        "offset": state.offset, "tokens": state.tokens, "is_scaled": state.scale_T1 is not None,
    }  # fmt: skip
    tensors = (state.values,) if state.scale_T1 is None else (state.values, state.scale_T1)
    return json.dumps(description).encode(), b"".join(map(tensor_bytes, tensors))


def _decoded(description: bytes, content: bytes) -> CachedState:
    told: dict[str, Any] = json.loads(description)
    values, rest = _tensor(content, getattr(torch, told["dtype"]), told["shape"])
    scale = _tensor(rest, torch.float32, [told["shape"][0], 1])[0] if told["is_scaled"] else None
    return CachedState(values=values, scale_T1=scale, offset=told["offset"], tokens=told["tokens"])


def _tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> tuple[Tensor, bytes]:
    size = dtype.itemsize * torch.Size(shape).numel()
    values = torch.frombuffer(bytearray(data[:size]), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return values.reshape(shape), data[size:]


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in memory order."""
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def _size(folder: Path) -> int:
    total = 0
    for file in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # another run may remove it meanwhile
            total += file.stat().st_size
    return total


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
