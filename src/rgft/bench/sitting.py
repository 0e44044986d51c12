"""A sitting: experiments go on from where they stopped, as far as time allows, several runs side by side.

A result is written where its run was made, as soon as there is one: whatever ends a sitting costs the runs that it was
at, and no others.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rgft.bench.experiment import Cell, Contender, Experiment, Results
from rgft.bench.fingerprint import DataCheck
from rgft.bench.runner import ALONE, Conditions, run_cell
from rgft.bench.tasks import bench_task
from rgft.errors import ConfigError, DataError, NonFiniteError, RGFTError

log = logging.getLogger("rgft")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that is over.

    Attributes:
        path: of its result.
        failure: why there is none; None: there is one.
    """

    path: Path
    failure: str | None = None


def run_experiments(
    experiments: Sequence[Experiment], folder: Path, conditions: Conditions = ALONE, *,
    stop_after_seconds: float | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """Makes the runs that experiments lack; yields each when it is over.

    Experiment by experiment and contender by contender, its learning rates before its final runs: what a sitting
    leaves can be compared. A run that fails is reported, and the others go on, but for those that would fail likewise.

    Args:
        experiments: each with a name of its own.
        folder: of all results; each experiment has one of its own in it.
        conditions: of the runs. With several jobs each is a process, and they share the cores.
        stop_after_seconds: no new run is begun after this time.

    Raises:
        ConfigError: two experiments have one name, or there is no room for a job.
        DataError: a stored result is damaged, of other settings, or measured on other data than there are now.
    """
    if conditions.jobs < 1:
        raise ConfigError(f"jobs: expected an integer >= 1, found {conditions.jobs}")
    names = [experiment.name for experiment in experiments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"expected experiments with names of their own, found {', '.join(twice)} more than once")
    started = time.perf_counter()
    agendas = [Agenda(experiment, folder / experiment.name, conditions) for experiment in experiments]
    running: dict[Future[None], tuple[Agenda, Cell]] = {}
    is_broken = False

    def goes_on() -> bool:
        is_late = stop_after_seconds is not None and time.perf_counter() - started > stop_after_seconds
        return not (is_broken or is_late)

    executor = _executor(conditions.jobs)
    try:
        while True:
            while len(running) < conditions.jobs and goes_on():
                taken = next(((agenda, cell) for agenda in agendas if (cell := agenda.take()) is not None), None)
                if taken is None:
                    break
                agenda, cell = taken
                future = executor.submit(make_run, agenda.experiment, cell, agenda.results.folder, conditions)
                running[future] = agenda, cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                (agenda, cell), error = running.pop(future), future.exception()
                path = agenda.results.path(cell)
                if error is None:
                    yield Outcome(path=path)
                    continue
                is_broken = is_broken or isinstance(error, BrokenExecutor)
                agenda.leave_out(cell, error)
                yield Outcome(path=path, failure=_reason(path, error))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class Agenda:
    """What an experiment still lacks, in the order in which it is made.

    Args:
        experiment: whose runs.
        folder: of its results.
        conditions: of the runs.
    """

    def __init__(self, experiment: Experiment, folder: Path, conditions: Conditions = ALONE) -> None:
        self.experiment, self.results = experiment, Results(folder)
        self._conditions = conditions
        self._taken: set[str] = set()
        self._lrs: dict[str, float] = {}
        self._left_out: set[str] = set()  # labels
        self._is_checked = False

    def take(self) -> Cell | None:
        """A run that can be begun now, which is not offered again; None: there is none, or none yet.

        Raises:
            DataError: see `run_experiments`; before the first run.
        """
        for cell in self._open():
            if cell.file_name in self._taken or self.results.path(cell).exists():
                continue
            if not self._is_checked:
                self._check()
                self._is_checked = True
            self._taken.add(cell.file_name)
            return cell
        return None

    def leave_out(self, cell: Cell, error: BaseException) -> None:
        """Offers no more runs that would fail as this one did: of an experiment without data, of a contender that
        cannot be."""
        if isinstance(error, DataError):
            self._left_out.update(contender.label for contender in self.experiment.contenders)
        elif isinstance(error, ConfigError):
            self._left_out.add(cell.contender.label)

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

    def _check(self) -> None:
        experiment, allowed = self.experiment, self._conditions.allow_code_execution
        check = DataCheck(lambda seed: bench_task(experiment.task, seed=seed, allow_code_execution=allowed))
        for cell in experiment.all_cells():
            result = self.results.read(cell)
            if result is None:
                continue
            for key, wanted in (("task", experiment.task), ("run", experiment.run)):
                if result.get(key, wanted) != wanted:
                    raise DataError(
                        f"{self.results.path(cell)}: expected a result with the experiment's {key!r} ({dict(wanted)}), "
                        f"found one with {result[key]}; give the experiment another name, or delete the file to run it "
                        "anew"
                    )
            check.require_same(result, str(self.results.path(cell)))
        if check.unknown:
            log.info("%s: %d results are from before data had fingerprints", self.results.folder, check.unknown)


def make_run(experiment: Experiment, cell: Cell, folder: Path, conditions: Conditions) -> None:
    """Makes a run and writes its result. One that diverges at a rate on trial has a result that says so."""
    try:
        result = run_cell(experiment, cell, conditions)
    except NonFiniteError as error:
        if cell.is_final:
            raise
        result = {
            "contender": cell.contender.label, "lr": cell.lr, "seed": cell.seed, "is_final": False,
            "task": dict(experiment.task), "run": dict(experiment.run), "metrics": {}, "diverged": str(error),
        }  # fmt: skip
    Results(folder).write(cell, result)


def _reason(path: Path, error: BaseException) -> str:
    if isinstance(error, BrokenExecutor):
        return "a process was killed, perhaps for memory, and others with it; fewer jobs need less"
    if not isinstance(error, RGFTError):
        log.error("%s", path.name, exc_info=error)
    return f"{type(error).__name__}: {error}"


def _executor(jobs: int) -> Executor:
    if jobs == 1:
        return _ThisProcess()
    # A forked process would share the threads' locks of a torch that has computed already.
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads,
        initargs=(max(1, len(os.sched_getaffinity(0)) // jobs),),
    )  # fmt: skip


class _ThisProcess(Executor):
    """Does at once what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
