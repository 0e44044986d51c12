"""What an experiment still lacks, and in what order it is made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rgft.bench.experiment import Cell, Contender, Experiment, Results
from rgft.bench.fingerprint import DataCheck
from rgft.bench.runner import ALONE, Conditions, identity_of
from rgft.bench.tasks import bench_task
from rgft.errors import DataError, RGFTError

log = logging.getLogger("rgft")


class Agenda:
    """The runs of an experiment that have no result, contender by contender, rates on trial before final runs.

    Args:
        experiment: whose runs.
        folder: of its results.
        conditions: of the runs.

    Attributes:
        failure: why nothing of it is run; empty: there is no such reason.

    Raises:
        DataError: a stored result is damaged, or of other settings than the experiment's.
    """

    def __init__(self, experiment: Experiment, folder: Path, conditions: Conditions = ALONE) -> None:
        self.experiment, self.results = experiment, Results(folder)
        self._conditions = conditions
        self._taken: set[str] = set()
        self._lrs: dict[str, float] = {}
        self._left_out: set[str] = set()  # labels
        self._are_data_known = False
        self.failure = ""
        # Of each stored result what its data are compared by: results are long, and read once.
        self._stored: list[tuple[Path, dict[str, Any]]] = []
        for cell in experiment.all_cells():
            result = self.results.read(cell)
            if result is not None:
                self._require_same_settings(cell, result)
                if "diverged" not in result:
                    self._stored.append((self.results.path(cell), {"seed": result["seed"], "data": result.get("data")}))

    def take(self) -> Cell | None:
        """A run that can be begun now, which is not offered again; None: there is none, or none yet."""
        for cell in self._open():
            if cell.file_name in self._taken or self.results.path(cell).exists():
                continue
            if not self._are_data_known:
                self._are_data_known = True
                if not self._has_same_data():
                    return None
            self._taken.add(cell.file_name)
            return cell
        return None

    def leave_out(self, contender: Contender | None) -> None:
        """Offers no more runs of a contender; None: of any."""
        self._left_out.update(c.label for c in self.experiment.contenders if contender is None or c is contender)

    def _open(self) -> Iterator[Cell]:
        """All runs whose learning rate is known, done ones among them."""
        for contender in self.experiment.contenders:
            if contender.label in self._left_out:
                continue
            yield from self.experiment.tuning_cells(contender)
            lr = self._lr(contender)
            if lr is not None:
                yield from self.experiment.final_cells(contender, lr)

    def _lr(self, contender: Contender) -> float | None:
        if contender.label not in self._lrs:
            lr = self.results.best_lr(self.experiment, contender)
            if lr is None:
                return None
            self._lrs[contender.label] = lr
        return self._lrs[contender.label]

    def _require_same_settings(self, cell: Cell, result: Mapping[str, Any]) -> None:
        wanted, revision = identity_of(self.experiment, cell), result.get("revision", 1)
        if revision != wanted["revision"]:
            raise DataError(
                f"{self.results.path(cell)}: expected a result of revision {wanted['revision']} of "
                f"{cell.contender.method!r}, found one of revision {revision}: the same settings made another run "
                "then. Delete the file to run it anew, or keep it under an experiment of another name"
            )
        for key in ("task", "run", "common_config", "budget", "settings"):
            if result.get(key, wanted[key]) != wanted[key]:
                raise DataError(
                    f"{self.results.path(cell)}: expected a result with the experiment's {key!r} ({wanted[key]}), "
                    f"found one with {result[key]}; give the experiment another name, or delete the file to run it anew"
                )

    def _has_same_data(self) -> bool:
        """Whether results and runs are on the same data; if not, nothing is run."""
        allowed = self._conditions.allow_code_execution
        check = DataCheck(lambda seed: bench_task(self.experiment.task, seed=seed, allow_code_execution=allowed))
        try:
            for path, result in self._stored:
                check.require_same(result, str(path))
        except RGFTError as error:
            self.failure = f"nothing of {self.experiment.name!r} is run: {error}"
            self.leave_out(None)
            return False
        if check.unknown:
            log.info("%s: %d results are from before data had fingerprints", self.results.folder, check.unknown)
        return True
