"""Claims on runs: of several sittings over one folder of results, one makes a run, and the others take other runs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rgft.telemetry.atomic_write import write_error

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

log = logging.getLogger("rgft")


@dataclass(frozen=True)
class Claim:
    """A run that is this process's until it is released, or the process ends, however it does.

    Attributes:
        path: of the file that is locked; what a process leaves that was killed is locked by nobody.
        descriptor: of it.
    """

    path: Path
    descriptor: int

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def claim(result: Path) -> Claim | None:
    """Claims a run, or gives None where somebody else has it.

    Systems without POSIX locks have none, and every claim is granted.

    Args:
        result: path of the result that it will have.

    Raises:
        RunFolderError: the folder cannot be written, or its file system has no locks.
    """
    path = result.with_name(f".{result.name}.claim")
    if fcntl is None:
        return Claim(path, os.open(os.devnull, os.O_RDONLY))
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise write_error(path, error) from error
        if _is_still_there(path, descriptor):
            return Claim(path, descriptor)
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    """Whether a locked file was not removed by its holder before it was locked."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class Claims:
    """What one sitting has claimed of the runs of an experiment or a study.

    Args:
        folder: of their results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[Path, Claim] = {}
        self._are_elsewhere: set[Path] = set()

    def take(self, result: Path) -> bool:
        """Claims a run; gives whether it is this sitting's now: not if it has a result, or another sitting is at it."""
        if result.exists():
            return False
        held = claim(result)
        if held is None:
            self._are_elsewhere.add(result)
            return False
        if result.exists():  # since it was looked for
            held.release()
            return False
        self._are_elsewhere.discard(result)
        self._held[result] = held
        return True

    def release(self, result: Path | None = None) -> None:
        """Ends the claim on a run; None: on all."""
        for path in list(self._held) if result is None else [result]:
            self._held.pop(path).release()

    def elsewhere(self) -> int:
        """How many runs were left to another sitting, and have no result yet."""
        return sum(not path.exists() for path in self._are_elsewhere)

    def close(self) -> None:
        """Ends the claims on all runs, and says what was left to another sitting."""
        self.release()
        if elsewhere := self.elsewhere():
            log.info("%s: %d runs are left to another sitting, which has begun them", self._folder, elsewhere)
