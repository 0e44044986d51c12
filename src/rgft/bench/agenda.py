"""What an experiment still lacks, and in what order it is made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rgft.bench.claims import Claims
from rgft.bench.durations import Durations
from rgft.bench.experiment import Cell, Choice, Contender, Experiment
from rgft.bench.fingerprint import DataCheck
from rgft.bench.results import Results, read_result, set_aside, unlike, write_result
from rgft.bench.runner import ALONE, Conditions, identity_of
from rgft.bench.tasks import bench_task
from rgft.bench.tuning import LAST, Standing, Tuning, standing
from rgft.errors import DataError

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
        self._claims = Claims(folder)
        self._tunings = {c.label: Tuning(experiment, c, self._standing) for c in experiment.contenders}
        self._settled: set[str] = set()  # labels
        self._left_out: set[str] = set()
        self._unfit: set[tuple[str, str | None]] = set()  # labels and their variants
        self._are_data_known = False
        self.failure = ""
        # Results are long, and read once: by file name how they stand, and of those from before what their data are
        # compared by.
        self._standings: dict[str, Standing] = {}
        self._durations = Durations(conditions.device)
        self._stored: list[tuple[Path, dict[str, Any]]] = []
        for cell in experiment.all_cells():
            result = self.note(cell)
            if result is not None:
                self._require_same_settings(cell, result)
                self._keep_data(self.results.path(cell), result)
            elif (path := self._elsewhere(cell)) is not None:
                self._keep_data(path, read_result(path))

    def take(self) -> Cell | None:
        """A run that can be begun now, which is not offered again; None: there is none, or none yet.

        It is claimed until it is released, so that another sitting takes other ones. When first asked, stored results
        are held against the data of now, whether or not a run is missing.
        """
        cell = self._claimed()
        if not self._are_data_known:
            self._are_data_known = True
            if not self._has_same_data(are_needed=cell is not None):
                self.release()
                return None
        return cell

    def release(self, cell: Cell | None = None) -> None:
        """Ends the claim on a run that was taken; None: on all."""
        self._claims.release(None if cell is None else self.results.path(cell))

    def close(self) -> None:
        """Ends all claims; see `Claims.close`."""
        self._claims.close()

    def note(self, cell: Cell) -> dict[str, Any] | None:
        """Takes notice of a run's result, and gives it; None: there is none."""
        result = self.results.read(cell)
        if result is not None:
            self._standings[cell.file_name] = standing(self.experiment, result)
            self._durations.note(result)
        return result

    def expected_seconds(self, cell: Cell) -> float:
        """How long a run may take; 0 where nothing is known."""
        return self._durations.expected(cell.contender)

    def leave_out(self, contender: Contender | None) -> None:
        """Offers no more runs of a contender; None: of any."""
        self._left_out.update(c.label for c in self.experiment.contenders if contender is None or c is contender)

    def leave_out_variant(self, cell: Cell) -> None:
        """Offers no more runs of the variant that is tried with this one, and chooses among the others."""
        self._unfit.add((cell.contender.label, cell.variant))

    def _claimed(self) -> Cell | None:
        for cell in self._open():
            if self._is_unfit(cell) or cell.file_name in self._taken or self._is_taken_over(cell):
                continue
            if self._claims.take(self.results.path(cell)):
                self._taken.add(cell.file_name)
                return cell
        return None

    def _open(self) -> Iterator[Cell]:
        """All runs whose learning rate is known, done ones among them."""
        for contender in self.experiment.contenders:
            if contender.label in self._left_out:
                continue
            choice = yield from self._tunings[contender.label].cells()
            if choice is None:
                continue
            if contender.label not in self._settled:
                self._settled.add(contender.label)
                self._settle(contender, choice)
            if not choice.has_diverged:
                yield from self.experiment.final_cells(contender, choice)

    def _is_taken_over(self, cell: Cell) -> bool:
        """Whether a missing result is there now, since the experiment that this one is like has it."""
        path = self._elsewhere(cell)
        if path is None:
            return False
        write_result(self.results.path(cell), {**read_result(path), **identity_of(self.experiment, cell)})
        log.info("%s: the same run as %s", self.results.path(cell), path)
        return True

    def _elsewhere(self, cell: Cell) -> Path | None:
        """Where the experiment that this one is like has the result of a run that is missing here."""
        if self.experiment.like is None or self.results.path(cell).exists():
            return None
        path = self.results.folder.with_name(self.experiment.like) / cell.file_name
        wanted = identity_of(self.experiment, cell)
        del wanted["chosen_by"]
        return path if path.exists() and not unlike(read_result(path), wanted) else None

    def _keep_data(self, path: Path, result: Mapping[str, Any]) -> None:
        if "diverged" not in result:
            self._stored.append((path, {"seed": result["seed"], "data": result.get("data")}))

    def _is_unfit(self, cell: Cell) -> bool:
        return (cell.contender.label, cell.variant) in self._unfit

    def _standing(self, cell: Cell) -> Standing | None:
        if self._is_unfit(cell):
            return LAST
        if cell.file_name not in self._standings:
            self.note(cell)
        return self._standings.get(cell.file_name)

    def _settle(self, contender: Contender, choice: Choice) -> None:
        """Final runs that were made with something else than what is chosen now are kept, and count no more."""
        if choice.has_diverged:
            log.warning("%s: a run diverged at each of its rates; it has no final runs", contender.label)
            return
        for path, result in self.results.finals(contender.label):
            if (result["lr"], result.get("variant")) != (choice.lr, choice.variant):
                log.warning("%s: superseded, kept as %s", path, set_aside(path, result).name)

    def _require_same_settings(self, cell: Cell, result: Mapping[str, Any]) -> None:
        wanted, path = identity_of(self.experiment, cell), self.results.path(cell)
        differing = unlike(result, wanted)
        if "revision" in differing:
            raise DataError(
                f"{path}: expected a result of revision {wanted['revision']} of {cell.contender.method!r}, found one "
                f"of revision {differing['revision']}: the same settings made another run then. Delete the file to run "
                "it anew, or keep it under an experiment of another name"
            )
        for key, value in differing.items():
            raise DataError(
                f"{path}: expected a result with the experiment's {key!r} ({wanted[key]}), found one with {value}; "
                "give the experiment another name, or delete the file to run it anew"
            )

    def _has_same_data(self, *, are_needed: bool) -> bool:
        """Whether results and runs are on the same data; if not, nothing is run."""
        allowed = self._conditions.allow_code_execution
        check = DataCheck(lambda seed: bench_task(self.experiment.task, seed=seed, allow_code_execution=allowed))
        if objection := check.objection(self._stored, self.results.folder, are_needed=are_needed):
            self.failure = f"nothing of {self.experiment.name!r} is run: {objection}"
            self.leave_out(None)
        return not objection
