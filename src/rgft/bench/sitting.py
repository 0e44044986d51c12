"""A sitting: experiments and studies go on from where they stopped, as far as time allows, several runs side by side.

A result is written where its run was made, as soon as there is one: whatever ends a sitting costs the runs that it was
at, and no others.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rgft.bench.agenda import Agenda
from rgft.bench.durations import TimeLeft
from rgft.bench.experiment import Cell, Experiment
from rgft.bench.results import Results
from rgft.bench.runner import ALONE, Conditions, TaskError, identity_of, run_cell
from rgft.errors import ConfigError, NonFiniteError, RGFTError, RunFolderError
from rgft.telemetry.environment import usable_cores

log = logging.getLogger("rgft")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that is over.

    Attributes:
        path: of its result.
        failure: why there is none; empty: there is one.
    """

    path: Path
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run has no result.

    Attributes:
        reason: in words.
        concerns: what would fail likewise: this run, all runs of its contender, or of its experiment.
        trace: where an unforeseen error came from.
    """

    reason: str
    concerns: Literal["run", "contender", "experiment"] = "run"
    trace: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that can be begun.

    Attributes:
        path: of its result.
        make: makes the run and writes its result, in whichever process: says why there is none.
        seconds: how long it may take; 0 where nothing is known.
        end: is told here, in the sitting's process, what became of it.
    """

    path: Path
    make: Callable[[], Failure | None]
    seconds: float
    end: Callable[[Failure | None], None]


class Source(Protocol):
    """Where jobs come from: an experiment, or a study."""

    @property
    def folder(self) -> Path:
        """Of its results."""
        ...

    @property
    def failure(self) -> str:
        """Why nothing of it is run; empty: there is no such reason."""
        ...

    def take(self) -> Job | None:
        """A run that is not offered again; None: there is none, or none yet."""
        ...

    def close(self) -> None:
        """The sitting is over."""
        ...


def run_experiments(
    experiments: Sequence[Experiment], folder: Path, conditions: Conditions = ALONE, *,
    stop_after_seconds: float | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """Makes the runs that experiments lack; yields each when it is over.

    Experiment by experiment and contender by contender, its learning rates before its final runs: what a sitting
    leaves can be compared. What another sitting over the same folder is at is left to it. A run that fails is reported,
    and the others go on, but for those that would fail likewise.

    Args:
        experiments: each with a name of its own.
        folder: of all results; each experiment has one of its own in it.
        conditions: of the runs.
        stop_after_seconds: the sitting's time, see `sit`; None: it has no end.

    Raises:
        ConfigError: two experiments have one name, or there is no room for a job.
        DataError: a stored result is damaged, or of other settings; before anything is run. (An experiment whose
            results are of other data is left out, and reported at the end.)
    """
    left = TimeLeft(stop_after_seconds)
    require_own_names("experiments", [experiment.name for experiment in experiments])
    agendas = [Agenda(experiment, folder / experiment.name, conditions) for experiment in experiments]
    yield from sit([_OfExperiment(agenda, conditions) for agenda in agendas], jobs=conditions.jobs, left=left)


def require_own_names(what: str, names: Sequence[str]) -> None:
    """Results of two with one name would be in one folder.

    Raises:
        ConfigError: there are such.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"expected {what} with names of their own, found {', '.join(twice)} more than once")


def sit(sources: Sequence[Source], *, jobs: int, left: TimeLeft) -> Iterator[Outcome]:
    """Makes the runs that sources offer, those of the first one first; yields each when it is over.

    Args:
        sources: of the runs.
        jobs: runs at a time. With several each is a process, and they share the cores.
        left: of the sitting's time: no run is begun after it, nor, but for the first, one that is expected to end
            after it.

    Raises:
        ConfigError: there is no room for a job.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: expected an integer >= 1, found {jobs}")
    running: dict[Future[Failure | None], Job] = {}
    executor = _executor(jobs)
    try:
        while True:
            while len(running) < jobs and not left.is_over:
                job = next((job for source in sources if (job := source.take()) is not None), None)
                if job is None or not left.allows(job.seconds):
                    break
                try:
                    future = executor.submit(job.make)
                except BrokenExecutor:  # between two runs
                    executor = _executor(jobs)
                    future = executor.submit(job.make)
                running[future] = job
            if not running:
                break
            is_broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                is_broken = is_broken or isinstance(error, BrokenExecutor)
                yield _outcome(job, future.result() if error is None else _of_pool(error))
            if is_broken:
                executor.shutdown(wait=True, cancel_futures=True)
                executor = _executor(jobs)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for source in sources:
            source.close()
    for source in sources:
        if source.failure:
            yield Outcome(path=source.folder, failure=source.failure)


def _outcome(job: Job, failure: Failure | None) -> Outcome:
    if failure is not None and failure.trace:
        log.error("%s:\n%s", job.path.name, failure.trace)
    job.end(failure)
    return Outcome(path=job.path, failure="" if failure is None else failure.reason)


class _OfExperiment:
    """The runs of an experiment's agenda."""

    def __init__(self, agenda: Agenda, conditions: Conditions) -> None:
        self._agenda, self._conditions = agenda, conditions

    @property
    def folder(self) -> Path:
        return self._agenda.results.folder

    @property
    def failure(self) -> str:
        return self._agenda.failure

    def take(self) -> Job | None:
        agenda = self._agenda
        cell = agenda.take()
        if cell is None:
            return None
        return Job(
            path=agenda.results.path(cell),
            make=partial(make_run, agenda.experiment, cell, self.folder, self._conditions),
            seconds=agenda.expected_seconds(cell),
            end=partial(self._end, cell),
        )

    def close(self) -> None:
        self._agenda.close()

    def _end(self, cell: Cell, failure: Failure | None) -> None:
        self._agenda.release(cell)
        if failure is None:
            self._agenda.note(cell)
        elif failure.concerns == "contender" and cell.variant is not None and not cell.is_final:
            self._agenda.leave_out_variant(cell)
            log.warning("%s: this variant is left out, and chosen among the others", cell.file_name)
        elif failure.concerns != "run":
            self._agenda.leave_out(cell.contender if failure.concerns == "contender" else None)
            log.warning("%s: the other runs of this %s are left out", cell.file_name, failure.concerns)


def _of_pool(error: BaseException) -> Failure:
    if isinstance(error, BrokenExecutor):
        return Failure(reason="a process was killed, perhaps for memory, and others with it; fewer jobs need less")
    return Failure(reason=f"{type(error).__name__}: {error}")


def _result(experiment: Experiment, cell: Cell, conditions: Conditions) -> dict[str, Any]:
    try:
        return run_cell(experiment, cell, conditions)
    except NonFiniteError as error:
        log.warning("%s: diverged: %s", cell.file_name, error)
        return {**identity_of(experiment, cell), "metrics": {}, "diverged": str(error)}


def make_run(experiment: Experiment, cell: Cell, folder: Path, conditions: Conditions) -> Failure | None:
    """Makes a run and writes its result; says why there is none.

    One that diverges has a result that says so.
    """
    return attempt(lambda: Results(folder).write(cell, _result(experiment, cell, conditions)))


def attempt(make: Callable[[], None]) -> Failure | None:
    """Makes a run; says why it failed, if it did."""
    try:
        make()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, TaskError):
            return Failure(reason=reason, concerns="experiment")
        if isinstance(error, (RunFolderError, NonFiniteError)):  # another run may have neither trouble
            return Failure(reason=reason)
        if isinstance(error, RGFTError):
            return Failure(reason=reason, concerns="contender")
        return Failure(reason=reason, trace=traceback.format_exc())
    return None


def _executor(jobs: int) -> Executor:
    if jobs == 1:
        return _ThisProcess()
    # A forked process would share the threads' locks of a torch that has computed already.
    return ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_job,
        initargs=(max(1, usable_cores() // jobs),),
    )  # fmt: skip


def _begin_job(threads: int) -> None:
    """In the process of a job: its share of the cores, and an end with the sitting, however that ends."""
    torch.set_num_threads(threads)
    sitting = multiprocessing.parent_process()
    assert sitting is not None

    def leave() -> None:
        sitting.join()
        os._exit(1)  # a job computes in its main thread, where nothing else would reach it

    threading.Thread(target=leave, daemon=True).start()


class _ThisProcess(Executor):
    """Does at once what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
