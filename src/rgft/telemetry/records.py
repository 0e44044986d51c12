"""Records: what happened in a run, one JSON object per line, readable while the run goes on and after it was killed.

The first line names the schema and its version. Every record is one write of one whole line, so that a crash can tear
the last line only: readers drop it with a warning, and the next writer cuts it off before it goes on. JSON has no NaN
and no infinities: they are written as `{"$float": "NaN" | "Infinity" | "-Infinity"}`.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rgft.errors import RGFTWarning, RunFolderError
from rgft.telemetry.atomic_write import write_all, write_error

SCHEMA = "rgft.records"
VERSION = 1

#: Types of records; those of `WITH_STEP` say which step they belong to.
TYPES = ("step", "probe", "plan", "skipping", "evaluation", "search", "warning", "end")
WITH_STEP = ("step", "probe", "plan", "skipping", "evaluation")

_RESERVED = ("type", "time")
_FLOAT = "$float"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the file.

    Attributes:
        type: one of `TYPES`.
        time: Unix time in seconds at which it was written.
        data: its other fields.
    """

    type: str
    time: float
    data: Mapping[str, Any]

    @property
    def step(self) -> int | None:
        return self.data.get("step")


class RecordWriter:
    """Appends records to a file, and goes on with one that a crash left behind.

    Args:
        path: the file; made when missing.
        sync: bring every record to disk at once (a power cut loses nothing; slower). Otherwise the operating system
            does, and only a crash of the machine can lose records.

    Raises:
        RunFolderError: the file is no record file, of another version, or cannot be written.
    """

    def __init__(self, path: Path | str, *, sync: bool = False) -> None:
        self.path = Path(path)
        self._sync = sync
        try:
            self._descriptor: int | None = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
            )
            content = self.path.read_bytes()
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            sound = _sound_length(content)
            if sound < len(content):
                _warn_torn(self.path, "was cut off")
                os.ftruncate(self._descriptor, sound)
            if sound:
                _check_header(self.path, content)
            else:
                self._write({"schema": SCHEMA, "version": VERSION})
        except BaseException:
            self.close()
            raise

    def append(self, type: str, data: Mapping[str, Any]) -> None:
        """Writes one record.

        Args:
            type: one of `TYPES`.
            data: its fields: JSON-like values, NaN and infinities allowed; tuples become lists.

        Raises:
            ValueError: an unknown type, a missing `step`, or a reserved field.
            TypeError: a value that JSON cannot hold; the message gives its place.
            RunFolderError: the disk is full, or the file is closed; the records before are intact.
        """
        if type not in TYPES:
            raise ValueError(f"record: expected a type of {', '.join(TYPES)}; found {type!r}")
        if type in WITH_STEP and not isinstance(data.get("step"), int):
            raise ValueError(f"a record of type {type!r} needs an integer 'step'; found {data.get('step')!r}")
        reserved = [key for key in _RESERVED if key in data]
        if reserved:
            raise ValueError(f"record {type!r}: the fields {', '.join(reserved)} are set by the writer; rename them")
        self._write({"type": type, "time": round(time.time(), 3), **data})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._descriptor is None:
            raise RunFolderError(f"{self.path}: these records were closed; open a new RecordWriter to append")
        text = json.dumps(encoded(line), ensure_ascii=False, allow_nan=False) + "\n"
        end = os.fstat(self._descriptor).st_size
        try:
            write_all(self._descriptor, text.encode("utf-8", "backslashreplace"))
            if self._sync:
                os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise write_error(self.path, error) from error

    def rewind(self, step: int) -> int:
        """Cuts the file before its first record of a step after `step`: what a resumed run writes again.

        Returns:
            Number of records cut off.
        """
        assert self._descriptor is not None
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = len(lines[0])
        for number, line in enumerate(lines[1:], start=1):
            if (json.loads(line).get("step") or 0) > step:
                os.ftruncate(self._descriptor, kept)
                return len(lines) - number
            kept += len(line)
        return 0

    def close(self) -> None:
        """Brings everything to disk and closes the file. May be called twice."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise write_error(self.path, error) from error
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path | str) -> list[Record]:
    """All whole records of a file, in order. A torn last line is dropped with a warning.

    Raises:
        RunFolderError: the file is missing or unreadable, of another version, or damaged before its last line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path}: the records could not be read: {error.strerror or error}") from error
    sound = _sound_length(content)
    if sound < len(content):
        _warn_torn(path, "is left out")
    if not sound:
        return []
    _check_header(path, content)
    records: list[Record] = []
    for number, line in enumerate(content[:sound].split(b"\n")[1:-1], start=2):
        try:
            data = decoded(json.loads(line))
            records.append(Record(type=data.pop("type"), time=data.pop("time"), data=data))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunFolderError(
                f"{path}, line {number}: expected a record (with 'type' and 'time'), found {line[:80]!r}; the file "
                "was damaged or edited: remove the line, or start a new run"
            ) from error
    return records


def _sound_length(content: bytes) -> int:
    """Bytes up to the end of the last whole line. A crash of the machine may leave a last line of zeros: torn too."""
    end = content.rfind(b"\n") + 1
    if not end:
        return 0
    start = content.rfind(b"\n", 0, end - 1) + 1
    try:
        json.loads(content[start:end])
    except ValueError:
        return start
    return end


def _check_header(path: Path, content: bytes) -> None:
    line = content[: content.find(b"\n")]
    try:
        header = json.loads(line)
        schema, version = header["schema"], header["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path}, line 1: expected a header naming the schema {SCHEMA!r}, found {line[:80]!r}; this is no "
            "record file"
        ) from error
    if schema != SCHEMA or version != VERSION:
        raise RunFolderError(
            f"{path}: expected schema {SCHEMA!r} version {VERSION}, found {schema!r} version {version!r}; use the RGFT "
            "version that wrote it (see environment.json beside it)"
        )


def _warn_torn(path: Path, what: str) -> None:
    warnings.warn(
        f"{path}: the last line is incomplete (the run was killed while writing it) and {what}",
        RGFTWarning,
        stacklevel=4,
    )


def encoded(value: Any, where: str = "record") -> Any:
    """`value` in what JSON has: tuples as lists, NaN and infinities as `{"$float": …}`.

    Raises:
        TypeError: anything else, with its place.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {_FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise TypeError(f"{where}: expected text as keys, found {bad[0]!r}")
        return {key: encoded(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: expected numbers, text, lists and mappings; found {type(value).__name__}")


def decoded(value: Any) -> Any:
    """Takes back `encoded`; tuples stay lists."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: decoded(item) for key, item in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value
