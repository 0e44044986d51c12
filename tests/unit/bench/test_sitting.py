"""Sittings: what is run when, what is left out, and what becomes of runs that fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench import claims, sitting
from rgft.bench.agenda import Agenda
from rgft.bench.durations import Durations
from rgft.bench.experiment import Cell, Choice, Experiment
from rgft.bench.results import Results
from rgft.bench.runner import Conditions, TaskError, identity_of
from rgft.bench.sitting import run_experiments
from rgft.cli.app import app
from rgft.errors import BudgetError, ConfigError, DataError, NonFiniteError, RunFolderError
from tests.unit.bench.test_experiment import contender, loaded
from tests.unit.tasks.pictures import save_folder, save_model

#: Of `description`: contender a is tuned first (two rates), and the second is better.
IN_ORDER = [
    "a--tuning--lr0.0001--seed100", "a--tuning--lr0.0002--seed100", "a--final--lr0.0002--seed0",
    "a--final--lr0.0002--seed1", "b--final--lr0.0001--seed1",
]  # fmt: skip


def result_of(experiment: Experiment, cell: Cell, **more: Any) -> dict[str, Any]:
    """The lower the higher the rate."""
    return {**identity_of(experiment, cell), "metrics": {"validation": {"loss": 1.0 - 1e3 * cell.lr}}, **more}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Stands in for runs: those named raise what is given; the list is of those that were begun."""

    def stand_in(**failures: Exception) -> list[str]:
        begun: list[str] = []

        def run_cell(experiment: Experiment, cell: Cell, conditions: Conditions) -> dict[str, Any]:
            begun.append(cell.file_name.removesuffix(".json"))
            error = failures.get(begun[-1].replace("--", "_").replace(".", "_"))
            if error is not None:
                raise error
            return result_of(experiment, cell)

        monkeypatch.setattr(sitting, "run_cell", run_cell)
        return begun

    return stand_in


def test_contender_by_contender_and_rates_before_final_runs(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    begun, experiment = runs(), loaded(tmp_path)
    outcomes = list(run_experiments([experiment], tmp_path))
    assert [outcome.path.stem for outcome in outcomes] == begun == IN_ORDER
    assert all(outcome.failure == "" for outcome in outcomes)
    assert all(outcome.path.parent == tmp_path / "x" for outcome in outcomes)
    assert list(run_experiments([experiment], tmp_path)) == []
    outcomes[3].path.unlink()
    begun.clear()
    list(run_experiments([experiment], tmp_path))
    assert begun == IN_ORDER[3:4]


def test_no_run_begins_after_its_time(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    begun = runs()
    assert list(run_experiments([loaded(tmp_path)], tmp_path, stop_after_seconds=-1.0)) == []
    assert begun == []


def test_no_run_begins_that_would_end_after_its_time_but_the_first(
    tmp_path: Path, runs: Callable[..., list[str]]
) -> None:
    begun, experiment = runs(), loaded(tmp_path)
    first = next(experiment.all_cells())
    store = Results(tmp_path / "x").write
    store(first, result_of(experiment, first, seconds=10.0, elapsed_seconds=1000.0))
    list(run_experiments([experiment], tmp_path, stop_after_seconds=900.0))
    assert begun == IN_ORDER[1:2]
    begun.clear()
    list(run_experiments([experiment], tmp_path, stop_after_seconds=3000.0))
    assert begun == IN_ORDER[2:]
    begun.clear()
    for path in (tmp_path / "x").glob("?--final*"):
        path.unlink()
    # What another device took says nothing.
    store(first, result_of(experiment, first, elapsed_seconds=1000.0, device="cuda"))
    list(run_experiments([experiment], tmp_path, stop_after_seconds=900.0))
    assert begun == IN_ORDER[2:]


def test_a_run_takes_as_long_as_its_contender_s_longest_or_the_mean_of_its_budget(tmp_path: Path) -> None:
    budgets = {"a": 0.3, "b": 0.3, "c": 0.1}
    a, b, c = loaded(
        tmp_path, contenders=[contender(label=label, budget=budget) for label, budget in budgets.items()]
    ).contenders  # fmt: skip
    durations = Durations("cpu")
    assert durations.expected(a) == 0.0
    for seconds in (10.0, 40.0):
        durations.note({"contender": "a", "budget": 0.3, "seconds": seconds})
    durations.note({"contender": "a", "budget": 0.3, "diverged": "step 3"})
    assert [durations.expected(one) for one in (a, b, c)] == [40.0, 25.0, 0.0]


def test_a_run_that_fails_is_reported_and_others_go_on(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    begun = runs(a_final_lr0_0002_seed0=RuntimeError("no memory"))
    outcomes = list(run_experiments([loaded(tmp_path)], tmp_path))
    assert begun == IN_ORDER
    assert [outcome.failure for outcome in outcomes] == ["", "", "RuntimeError: no memory", "", ""]
    assert not outcomes[2].path.exists()
    begun.clear()
    list(run_experiments([loaded(tmp_path)], tmp_path))
    assert begun == IN_ORDER[2:3]


def test_a_contender_whose_rates_are_not_known_waits(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    begun = runs(a_tuning_lr0_0001_seed100=ValueError("x"))
    list(run_experiments([loaded(tmp_path)], tmp_path))
    assert begun == [*IN_ORDER[:2], IN_ORDER[4]]


@pytest.mark.parametrize(
    ("error", "rest"),
    [
        (ConfigError("no classifier"), IN_ORDER[4:]),
        (BudgetError("too little"), IN_ORDER[4:]),
        (DataError("no earlier result"), IN_ORDER[4:]),
        (TaskError("no package"), []),
    ],
)
def test_what_would_fail_likewise_is_left_out(
    tmp_path: Path, runs: Callable[..., list[str]], error: Exception, rest: list[str]
) -> None:
    begun = runs(a_tuning_lr0_0001_seed100=error)
    outcomes = list(run_experiments([loaded(tmp_path)], tmp_path))
    assert begun == [IN_ORDER[0], *rest]
    assert [outcome.failure == "" for outcome in outcomes] == [False] + [True] * len(rest)


def test_a_variant_that_cannot_be_run_leaves_the_choice_to_the_others(
    tmp_path: Path, runs: Callable[..., list[str]]
) -> None:
    few, many = ({"config": {"mask": {"q": q}}} for q in (0.25, 0.75))
    tuned = contender(method="random", lrs=[1e-4, 2e-4], variants={"few": few, "many": many})
    experiment = loaded(tmp_path, contenders=[tuned], max_extensions=0)
    begun = runs(a_tuning_few_lr0_0002_seed100=BudgetError("too little"))
    outcomes = list(run_experiments([experiment], tmp_path))
    assert [outcome.path.stem for outcome in outcomes if outcome.failure] == ["a--tuning--few--lr0.0002--seed100"]
    assert begun == [
        *IN_ORDER[:2], "a--tuning--few--lr0.0002--seed100", "a--tuning--many--lr0.0002--seed100",
        "a--tuning--many--lr0.0001--seed100", *IN_ORDER[2:4],
    ]  # fmt: skip
    # Whether it can be run now, each sitting asks anew.
    begun.clear()
    assert [outcome.failure for outcome in run_experiments([experiment], tmp_path)] == ["BudgetError: too little"]
    assert begun == ["a--tuning--few--lr0.0002--seed100"]


def test_one_experiment_s_data_do_not_stop_another(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    begun = runs()
    first, second = loaded(tmp_path), loaded(tmp_path, name="y", task={"name": "no_such_task"})
    stored = next(second.all_cells())
    Results(tmp_path / "y").write(stored, result_of(second, stored, data={}))
    outcomes = list(run_experiments([second, first], tmp_path))
    assert begun == IN_ORDER
    assert [outcome.path.name for outcome in outcomes if outcome.failure] == ["y"]
    assert "no_such_task" in outcomes[-1].failure


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_costs_its_own_runs(
    tmp_path: Path, runs: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, pools = runs(), [0]

    def executor(jobs: int) -> Executor:
        """A pool whose first process dies, then this process."""
        pools[0] += 1
        return Dying() if pools[0] == 1 else sitting._ThisProcess()

    class Dying(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                return pool.submit(kill)

    monkeypatch.setattr(sitting, "_executor", executor)
    outcomes = list(run_experiments([loaded(tmp_path)], tmp_path))
    assert "a process was killed" in outcomes[0].failure
    assert begun == [IN_ORDER[1], IN_ORDER[4]]
    assert pools == [2]


def sleep_on(note: Path) -> None:
    note.with_suffix(".part").write_text(str(os.getpid()))
    note.with_suffix(".part").rename(note)
    time.sleep(600)


def sit(note: Path) -> None:
    sitting._executor(2).submit(sleep_on, note).result()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by /proc")
def test_jobs_end_with_a_sitting_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "process"
    process = multiprocessing.get_context("spawn").Process(target=sit, args=(note,))
    process.start()
    deadline = time.monotonic() + 120
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job = int(note.read_text())
    assert is_running(job)
    process.kill()
    process.join()
    while is_running(job) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(job)


def test_a_run_that_diverges_has_a_result_that_says_so(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    error = NonFiniteError("step 3: loss is nan")
    begun = runs(a_tuning_lr0_0002_seed100=error, b_final_lr0_0001_seed1=error)
    experiment = loaded(tmp_path)
    outcomes = list(run_experiments([experiment], tmp_path))
    assert begun[2] == "a--final--lr0.0001--seed0"
    assert [outcome.failure for outcome in outcomes] == [""] * 5
    for place, is_final in ((1, False), (4, True)):
        stored = json.loads(outcomes[place].path.read_text())
        assert (stored["diverged"], stored["metrics"], stored["is_final"]) == ("step 3: loss is nan", {}, is_final)
    begun.clear()
    assert list(run_experiments([experiment], tmp_path)) == begun == []


def test_what_runs_elsewhere_is_not_offered_again(tmp_path: Path) -> None:
    agenda = Agenda(loaded(tmp_path), tmp_path / "x")
    taken = [agenda.take() for _ in range(4)]
    assert [cell and cell.file_name.removesuffix(".json") for cell in taken] == [*IN_ORDER[:2], IN_ORDER[4], None]
    for cell in taken[:2]:
        assert cell is not None
        agenda.results.write(cell, result_of(agenda.experiment, cell))
    rest = [agenda.take() for _ in range(3)]
    assert [cell and cell.file_name.removesuffix(".json") for cell in rest] == [*IN_ORDER[2:4], None]


def test_two_sittings_make_each_run_once(tmp_path: Path) -> None:
    experiment = loaded(tmp_path)
    ours, theirs = (Agenda(experiment, tmp_path / "x") for _ in range(2))
    first, second = ours.take(), theirs.take()
    assert first is not None
    assert second is not None
    assert [cell.file_name.removesuffix(".json") for cell in (first, second)] == IN_ORDER[:2]
    # What is given up without a result is taken by whoever asks next, and what has one by nobody.
    ours.release(first)
    assert theirs.take() == first
    theirs.results.write(first, result_of(experiment, first))
    theirs.release()
    theirs.results.write(second, result_of(experiment, second))
    taken = ours.take()
    assert taken is not None
    assert taken.file_name.removesuffix(".json") == IN_ORDER[2]
    ours.release()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [first.file_name, second.file_name]


def test_a_sitting_leaves_no_claims_and_says_what_it_left_to_another(
    tmp_path: Path, runs: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    begun, experiment = runs(a_tuning_lr0_0001_seed100=RuntimeError("no memory")), loaded(tmp_path)
    other = Agenda(experiment, tmp_path / "x")
    last = list(experiment.all_cells())[-1]
    held = claims.claim(other.results.path(last))
    assert held is not None
    with caplog.at_level("INFO", logger="rgft"):
        list(run_experiments([experiment], tmp_path))
    assert begun == IN_ORDER[:2]
    assert "x: 1 runs are left to another sitting" in caplog.text
    held.release()
    list(run_experiments([experiment], tmp_path))
    assert last.file_name.removesuffix(".json") in begun
    assert list((tmp_path / "x").glob(".*")) == []


def hold(result: Path) -> None:
    assert claims.claim(result) is not None
    kill()


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    result = tmp_path / "a.json"
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(result,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".a.json.claim"]
    found = claims.claim(result)
    assert found is not None
    assert claims.claim(result) is None
    found.release()
    with pytest.raises(RunFolderError, match=r"\.a\.json\.claim: it could not be written"):
        claims.claim(tmp_path / "none" / "a.json")


def test_what_is_left_to_another_sitting_has_no_result_and_was_not_taken_later(tmp_path: Path) -> None:
    ours, theirs = claims.Claims(tmp_path), claims.Claims(tmp_path)
    made, failed, begun = (tmp_path / f"{name}.json" for name in ("made", "failed", "begun"))
    assert all(theirs.take(result) for result in (made, failed, begun))
    assert not any(ours.take(result) for result in (made, failed, begun))
    assert ours.elsewhere() == 3
    made.write_text("{}")
    theirs.release(failed)
    assert ours.take(failed)
    ours.release(failed)
    assert ours.elsewhere() == 1
    theirs.close()
    assert not ours.take(made)
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize(
    ("count", "jobs", "message"), [(2, 1, "found x more than once"), (1, 0, "jobs: expected an integer >= 1, found 0")]
)
def test_what_cannot_be_run_is_said_before(tmp_path: Path, count: int, jobs: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(run_experiments([loaded(tmp_path)] * count, tmp_path, Conditions(jobs=jobs)))


def small_images(tmp_path: Path) -> Experiment:
    """Two short runs on a folder of images."""
    for split, first, count in (("train", 0, 12), ("val", 100, 4), ("test", 200, 4)):
        save_folder(tmp_path / "data" / split, {"cat": count, "dog": count}, first=first)
    task = {"name": "images", "data": str(tmp_path / "data"), "model": str(save_model(tmp_path / "model"))}
    contenders = [{"label": "a", "method": "full", "budget": 0.7, "lrs": [1e-3], "seeds": [0, 1]}]
    return loaded(tmp_path, task=task, run={"epochs": 1.0, "batch_size": 8}, contenders=contenders)


def test_runs_side_by_side_have_the_results_of_runs_alone(tmp_path: Path) -> None:
    experiment = small_images(tmp_path)
    for jobs in (1, 2):
        outcomes = list(run_experiments([experiment], tmp_path / str(jobs), Conditions(jobs=jobs)))
        assert [outcome.failure for outcome in outcomes] == ["", ""]
    cells = list(experiment.final_cells(experiment.contenders[0], Choice(lr=1e-3)))
    alone, beside = ([Results(tmp_path / str(jobs) / "x").read(cell) for cell in cells] for jobs in (1, 2))
    for one, other in zip(alone, beside, strict=True):
        assert one is not None
        assert other is not None
        assert (one["jobs"], other["jobs"], other["device"]) == (1, 2, "cpu")
        assert one["metrics"]["test"]["loss"] == pytest.approx(other["metrics"]["test"]["loss"], abs=1e-5)
        assert one["ledger"]["flops"] == other["ledger"]["flops"]
        assert one["elapsed_seconds"] > one["seconds"] > 0
    assert beside[0] is not None
    assert beside[0]["environment"]["torch"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_the_command_names_what_failed_and_says_so_by_its_exit_code(
    tmp_path: Path, runs: Callable[..., list[str]]
) -> None:
    runs(b_final_lr0_0001_seed1=RuntimeError("no memory"))
    loaded(tmp_path)
    command = ["bench", "run", str(tmp_path / "experiment.json"), "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert result.exit_code == 1
    assert "b--final--lr0.0001--seed1.json: FAILED: RuntimeError: no memory" in result.output
    assert "1 failed" in result.output
    assert len(list((tmp_path / "results" / "x").iterdir())) == 4


def test_the_command_runs_only_the_contenders_that_are_named(tmp_path: Path, runs: Callable[..., list[str]]) -> None:
    runs()
    loaded(tmp_path)
    command = ["bench", "run", str(tmp_path / "experiment.json"), "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--only", "b"])
    assert result.exit_code == 0
    made = {path.name.split("--")[0] for path in (tmp_path / "results" / "x").iterdir()}
    assert made == {"b"}
    result = CliRunner().invoke(app, [*command, "--only", "b", "--only", "nobody"])
    assert result.exit_code == 2
    assert "found nobody" in result.output
