"""The run folder: where everything a run leaves behind lies, and how it gets there without half-written files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import torch
from torch import Tensor

from rgft.errors import RunFolderError
from rgft.telemetry.atomic_write import TEMPORARY, atomic_file, atomic_folder, is_full, write_bytes, write_error
from rgft.telemetry.records import Record, RecordWriter, decoded, encoded, read_records

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
RECORDS = "records.jsonl"
ERROR_MAP = "error_map.json"
PLANS = "plans.jsonl"
LEDGER = "ledger.json"
MEMORY = "memory.json"
REPORT = "report.html"
MODEL = "model"
CHECKPOINT = "checkpoint"

#: Everything that a run writes, and all that `overwrite` removes.
LAYOUT = (CONFIG, ENVIRONMENT, RECORDS, ERROR_MAP, PLANS, LEDGER, MEMORY, REPORT, MODEL, CHECKPOINT)

_STATE = "state.pt"


class RunFolder:
    """An existing run folder. `RunFolder.create` makes one for writing, `RunFolder.open` takes one for reading.

    Attributes:
        path: the folder.
        sync: whether every record is brought to disk at once.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self.path, self.sync = path, sync

    @classmethod
    def create(
        cls, path: Path | str, *, resume: bool = False, overwrite: bool = False, sync: bool = False
    ) -> RunFolder:
        """Makes the folder, or takes an existing one to go on with it or to write it anew.

        Args:
            path: the folder; parents are made too.
            resume: go on with the run in it.
            overwrite: remove the run in it first. What no run wrote is left alone.
            sync: bring every record to disk at once.

        Raises:
            RunFolderError: the folder is not empty and neither flag is given, or both are; it is no run folder; there
                is nothing to resume; it cannot be written.
        """
        folder = cls(Path(path), sync=sync)
        content = folder.check(path, resume=resume, overwrite=overwrite)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_full(error):
                raise write_error(folder.path, error) from error
            raise RunFolderError(
                f"{folder.path}: expected a folder that can be written, but it could not be made: "
                f"{error.strerror or error}; choose another path"
            ) from error
        if resume:
            folder._remove_leftovers()
        elif content:
            folder._clear()
        return folder

    @staticmethod
    def check(path: Path | str, *, resume: bool = False, overwrite: bool = False) -> list[str]:
        """Refuses what `create` would refuse, and touches nothing; returns the names in the folder.

        Raises:
            RunFolderError: as `create` does.
        """
        path = Path(path)
        if resume and overwrite:
            raise RunFolderError(f"{path}: expected resume or overwrite, found both; --resume keeps what is there")
        try:
            content = sorted(item.name for item in path.iterdir()) if path.exists() else []
            above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        except NotADirectoryError as error:
            raise RunFolderError(f"{path}: expected a folder, found a file; choose another path") from error
        except OSError as error:
            raise RunFolderError(f"{path}: could not be read: {error.strerror or error}") from error
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            what = "a folder that may not be written" if above.is_dir() else "a file"
            raise RunFolderError(
                f"{path}: expected a folder that can be written, found {what}, {above}; choose another"
            )
        is_run = (path / CONFIG).is_file()
        if resume and not is_run:
            raise RunFolderError(f"{path}: nothing to resume, there is no {CONFIG} in it; start without --resume")
        if content and not (resume or overwrite):
            raise RunFolderError(
                f"{path}: expected a new or empty folder, found {', '.join(content[:4])}{' …' * (len(content) > 4)}; "
                "--resume (resume=True) goes on with the run in it, --overwrite (overwrite=True) replaces it"
            )
        if content and overwrite and not is_run:
            raise RunFolderError(
                f"{path}: --overwrite replaces runs only, and this folder holds none ({CONFIG} is missing); it was "
                "left as it is: choose another folder"
            )
        return content

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Takes an existing run folder for reading.

        Raises:
            RunFolderError: there is none.
        """
        folder = cls(Path(path))
        if not folder._is_run:
            raise RunFolderError(f"{path}: expected a run folder (with {CONFIG} in it), found none")
        return folder

    @property
    def _is_run(self) -> bool:
        return (self.path / CONFIG).is_file()

    def _remove_leftovers(self) -> None:
        """Removes what killed processes were writing: nobody reads it, and a half checkpoint is large."""
        try:
            for folder in (self.path, self.path / CHECKPOINT):
                for item in folder.glob(TEMPORARY):
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        except OSError as error:
            raise write_error(self.path, error) from error

    def _clear(self) -> None:
        self._remove_leftovers()
        try:
            for name in (item for item in LAYOUT if item != CONFIG):
                item = self.path / name
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink(missing_ok=True)
            # Last, so that an interrupted removal can be repeated: without it the folder is no run folder.
            (self.path / CONFIG).unlink()
        except OSError as error:
            raise write_error(self.path, error) from error

    # ---------------------------------------------------------------- files

    @cached_property
    def records(self) -> RecordWriter:
        """The records, for appending; opened at first use."""
        return RecordWriter(self.path / RECORDS, sync=self.sync)

    @cached_property
    def plans(self) -> RecordWriter:
        """The plan history, for appending (records of type `plan`)."""
        return RecordWriter(self.path / PLANS, sync=self.sync)

    def read_records(self) -> list[Record]:
        """All records so far. Raises RunFolderError as `records.read_records` does."""
        return read_records(self.path / RECORDS)

    def read_plans(self) -> list[Record]:
        """All plans so far."""
        return read_records(self.path / PLANS)

    @property
    def model(self) -> Path:
        """Where the model is saved in its own format."""
        return self.path / MODEL

    def save_model(self, save: Callable[[Path], object]) -> Path:
        """Has `save` write the model into a folder beside, then puts that in place; returns `model`.

        Raises:
            RunFolderError: the disk is full, or the folder cannot be written; nothing half-written is left.
        """
        with atomic_folder(self.model) as folder:
            save(folder)
        return self.model

    def write_json(self, name: str, data: Any) -> None:
        """Writes a JSON file of the layout atomically; NaN and infinities as in records.

        Raises:
            TypeError: a value that JSON cannot hold.
            RunFolderError: the disk is full, or the folder cannot be written; the old file is intact.
        """
        text = json.dumps(encoded(data, name), ensure_ascii=False, allow_nan=False, indent=2)
        self.write_bytes(name, (text + "\n").encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file of the layout atomically. Raises RunFolderError as `write_json` does."""
        write_bytes(self.path / name, data)

    def read_json(self, name: str) -> Any:
        """Reads what `write_json` wrote; tuples come back as lists.

        Raises:
            RunFolderError: the file is missing or no JSON.
        """
        path = self.path / name
        try:
            return decoded(json.loads(path.read_bytes()))
        except OSError as error:
            raise RunFolderError(f"{path}: could not be read: {error.strerror or error}") from error
        except ValueError as error:
            raise RunFolderError(f"{path}: expected JSON: {error}") from error

    # ---------------------------------------------------------------- checkpoints

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to resume from."""
        return (self.path / CHECKPOINT / _STATE).is_file()

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Saves a state; the previous one stands until the new one is complete and on disk.

        Args:
            state: tensors, numbers, text, bytes and None, in any nesting of dicts, lists and tuples: what can be read
                back without running code from the file.

        Raises:
            TypeError: something else is in it; all places are listed, and nothing is written.
            RunFolderError: the disk is full, or the folder cannot be written; the previous checkpoint is intact.
        """
        problems = _not_plain(state, "state")
        if problems:
            raise TypeError("a checkpoint holds tensors and plain values only; found " + "; ".join(problems[:10]))
        folder = self.path / CHECKPOINT
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error
        with atomic_file(folder / _STATE) as file:
            torch.save(state, cast("IO[bytes]", file))

    def load_checkpoint(self) -> dict[str, Any]:
        """The latest complete state, tensors on the CPU.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        path = self.path / CHECKPOINT / _STATE
        if not path.is_file():
            raise RunFolderError(
                f"{self.path}: nothing to resume, the run stopped before its first checkpoint; --overwrite starts again"
            )
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise RunFolderError(
                f"{path}: the checkpoint could not be read, it was damaged or edited ({error}); --overwrite "
                "starts again"
            ) from error

    def remove_checkpoint(self) -> None:
        """A finished run is not resumed; its checkpoint is three times the model."""
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)

    # ---------------------------------------------------------------- leaving

    def close(self) -> None:
        """Closes the files that were opened; the next use opens them again."""
        for name in ("records", "plans"):
            writer = self.__dict__.pop(name, None)
            if writer is not None:
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _not_plain(value: Any, where: str) -> list[str]:
    """Places and types of what `torch.load(weights_only=True)` would refuse."""
    # Exact types: a subclass is pickled by the name of its class, which the reader would have to run.
    if value is None or type(value) in (bool, int, float, str, bytes, complex, torch.Size, torch.dtype, torch.device):
        return []
    if isinstance(value, Tensor):
        return []
    if type(value) in (dict, OrderedDict):
        problems = [f"the key {key!r} of {where}" for key in value if type(key) not in (str, int, float, bool, tuple)]
        return problems + [p for key, item in value.items() for p in _not_plain(item, f"{where}.{key}")]
    if type(value) in (list, tuple, set):
        return [p for index, item in enumerate(value) for p in _not_plain(item, f"{where}[{index}]")]
    return [f"{type(value).__name__} at {where}"]
