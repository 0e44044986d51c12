"""A sitting: experiments go on from where they stopped, as far as time allows, several runs side by side.

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
from pathlib import Path
from typing import Any, Literal

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
        conditions: of the runs. With several jobs each is a process, and they share the cores.
        stop_after_seconds: no run is begun after this time, nor, but for the first, one that is expected to end
            after it.

    Raises:
        ConfigError: two experiments have one name, or there is no room for a job.
        DataError: a stored result is damaged, or of other settings; before anything is run. (An experiment whose
            results are of other data is left out, and reported at the end.)
    """
    if conditions.jobs < 1:
        raise ConfigError(f"jobs: expected an integer >= 1, found {conditions.jobs}")
    names = [experiment.name for experiment in experiments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"expected experiments with names of their own, found {', '.join(twice)} more than once")
    left = TimeLeft(stop_after_seconds)
    agendas = [Agenda(experiment, folder / experiment.name, conditions) for experiment in experiments]
    running: dict[Future[Failure | None], tuple[Agenda, Cell]] = {}
    executor = _executor(conditions.jobs)
    try:
        while True:
            while len(running) < conditions.jobs and not left.is_over:
                taken = _next(agendas)
                if taken is None:
                    break
                agenda, cell = taken
                if not left.allows(agenda.expected_seconds(cell)):
                    break
                task = (make_run, agenda.experiment, cell, agenda.results.folder, conditions)
                try:
                    future = executor.submit(*task)
                except BrokenExecutor:  # between two runs
                    executor = _executor(conditions.jobs)
                    future = executor.submit(*task)
                running[future] = agenda, cell
            if not running:
                break
            is_broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                agenda, cell = running.pop(future)
                error = future.exception()
                is_broken = is_broken or isinstance(error, BrokenExecutor)
                yield _outcome(agenda, cell, future.result() if error is None else _of_pool(error))
            if is_broken:
                executor.shutdown(wait=True, cancel_futures=True)
                executor = _executor(conditions.jobs)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for agenda in agendas:
            agenda.release()
    for agenda in agendas:
        if elsewhere := agenda.elsewhere():
            log.info("%s: %d runs are left to another sitting, which has begun them", agenda.results.folder, elsewhere)
        if agenda.failure:
            yield Outcome(path=agenda.results.folder, failure=agenda.failure)


def _next(agendas: Sequence[Agenda]) -> tuple[Agenda, Cell] | None:
    return next(((agenda, cell) for agenda in agendas if (cell := agenda.take()) is not None), None)


def _outcome(agenda: Agenda, cell: Cell, failure: Failure | None) -> Outcome:
    path = agenda.results.path(cell)
    agenda.release(cell)
    if failure is None:
        agenda.note(cell)
        return Outcome(path=path)
    if failure.trace:
        log.error("%s:\n%s", path.name, failure.trace)
    if failure.concerns != "run":
        agenda.leave_out(cell.contender if failure.concerns == "contender" else None)
        log.warning("%s: the other runs of this %s are left out", path.name, failure.concerns)
    return Outcome(path=path, failure=failure.reason)


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
    try:
        Results(folder).write(cell, _result(experiment, cell, conditions))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, TaskError):
            return Failure(reason=reason, concerns="experiment")
        if isinstance(error, RunFolderError):
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
