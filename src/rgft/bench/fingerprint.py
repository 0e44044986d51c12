"""Whether the data of a result have changed since it was measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rgft.errors import DataError, RGFTError
from rgft.tasks.base import PreparedTask
from rgft.tasks.fingerprint import SPLITS, Data, data_of, said

log = logging.getLogger("rgft")


class DataMissingError(DataError):
    """There are no data to compare with: they, or what reads them, are not on this machine."""


class DataCheck:
    """Refuses results that were measured on other data than there are now.

    Args:
        prepare: seed → the task; called once for each seed that is asked about.
    """

    def __init__(self, prepare: Callable[[int], PreparedTask]) -> None:
        self._prepare = prepare
        self._by_seed: dict[int, Data] = {}
        self.unknown = 0  # results from before fingerprints were kept

    def now(self, seed: int) -> Data:
        """The data of runs with this seed.

        Raises:
            DataMissingError: the task cannot be prepared.
        """
        if seed not in self._by_seed:
            try:
                task = self._prepare(seed)
            except RGFTError as error:
                raise DataMissingError(str(error)) from error
            self._by_seed[seed] = data_of(task)
        return self._by_seed[seed]

    def objection(self, stored: Iterable[tuple[Path, Mapping[str, Any]]], folder: Path, *, are_needed: bool) -> str:
        """Why a folder's results cannot be added to: one is of other data than those of now, or there are none now.

        Args:
            stored: (path, result) of each.
            folder: in which they lie.
            are_needed: whether anything is to be run; if not, data that are not at hand are not missed.

        Returns:
            The reason in words; empty: there is none.
        """
        try:
            for path, result in stored:
                self.require_same(result, str(path))
        except RGFTError as error:
            if are_needed or not isinstance(error, DataMissingError):
                return str(error)
            log.info("%s: not compared with the data of now: %s", folder, error)
            return ""
        if self.unknown:
            log.info("%s: %d results are from before data had fingerprints", folder, self.unknown)
        return ""

    def require_same(self, result: Mapping[str, Any], where: str) -> None:
        """Compares a stored result's data with those of now.

        Raises:
            DataError: they differ.
            DataMissingError: there are none now.
        """
        then: Data | None = result.get("data")
        if then is None:
            self.unknown += 1
            return
        require_equal(then, self.now(int(result["seed"])), where, "the data of now")


def require_equal(then: Data, now: Data, where: str, other: str) -> None:
    """Raises DataError naming the splits that differ.

    What a task is judged on beside its splits is compared where both say it: results from before do not.

    Args:
        then, now: what is compared.
        where: the result's file.
        other: what it is compared with, in words.
    """
    parts = [*SPLITS, *sorted((then.keys() & now.keys()) - set(SPLITS))]
    changed = [part for part in parts if then.get(part) != now.get(part)]
    if not changed:
        return
    differences = "; ".join(f"{split}: {said(then.get(split))} there, {said(now.get(split))} now" for split in changed)
    raise DataError(
        f"{where}: measured on other data than {other} ({differences}); bring the old data back (package versions, "
        "files, Python), or delete the file to run it anew"
    )
