"""`Run`: audits, what is recorded under which step, stopping, and going on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import rgft.run
from rgft import Config
from rgft.cli.preparing import prepare_task
from rgft.cli.request import read_request
from rgft.run import Run, Settings
from rgft.tasks.base import PreparedTask
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import save_inputs

SETTINGS = Settings(lr=1e-3, epochs=2, batch_size=8)
CONFIG: dict[str, Any] = {"budget": 0.6, "probe": {"interval": 4, "size": 4}, "seed": 5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedTask:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder, rows=120)
    return prepare_task(read_request(flags={"model": str(folder / "model"), "data": str(folder / "data.csv")}).settings)


@pytest.fixture
def task(prepared: PreparedTask) -> PreparedTask:
    task = copy.copy(prepared)
    task.model = copy.deepcopy(prepared.model)
    return task


def trained(task: PreparedTask, **arguments: Any) -> Run:
    run = Run(task, Config(**CONFIG), SETTINGS, **arguments)
    run.train()
    run.close()
    return run


def test_audits_move_nothing_and_agree_with_the_model(
    task: PreparedTask, prepared: PreparedTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.copy(prepared)
    other.model = copy.deepcopy(prepared.model)
    audited = trained(task).guide.ledger
    monkeypatch.setattr(rgft.run, "MAX_AUDITS", 0)
    plain = trained(other).guide.ledger
    assert audited.audits >= 2  # with everything on, and under the first plan
    assert plain.audits == 0
    assert audited.audit_error == pytest.approx(0.0, abs=0.02)
    weights = other.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in task.model.state_dict().items())
    assert audited.spent_flops == plain.spent_flops


def test_probes_and_plans_are_recorded_under_the_step_that_they_came_before(task: PreparedTask, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as folder:
        run = trained(task, folder=folder)
    records = folder.read_records()
    probes = [(r.step, r.data["values"]) for r in records if r.type == "probe"]
    assert probes == [(step + 1, values) for step, values in run.guide.map_history]
    assert len(probes) >= 3
    assert [(p.step, p.data["cut"]) for p in folder.read_plans()] == [(p.step + 1, p.cut) for p in run.guide.plans]
    steps = [r.step for r in records if r.type == "step"]
    assert steps == list(range(1, run.guide.step_count + 1))


@pytest.mark.parametrize("stop_at", [1, 4, 5, 8])
def test_a_stopped_run_goes_on_bit_for_bit(
    task: PreparedTask, prepared: PreparedTask, tmp_path: Path, stop_at: int
) -> None:
    """Each record once, wherever the run was stopped: also right before a probe and a new plan."""
    with RunFolder.create(tmp_path / "whole") as whole:
        trained(task, folder=whole)
    interrupted = copy.copy(prepared)
    interrupted.model = copy.deepcopy(prepared.model)
    with RunFolder.create(tmp_path / "run") as folder:
        run = Run(interrupted, Config(**CONFIG), SETTINGS, folder=folder)
        run.observers.append(lambda report: run.stop() if report.step == stop_at else None)
        run.train()
        assert run.guide.step_count == stop_at
        run.close()
        again = copy.copy(prepared)
        again.model = copy.deepcopy(prepared.model)
        torch.manual_seed(1234)  # another process starts elsewhere
        run = Run(again, Config(**CONFIG), SETTINGS, folder=folder)
        assert run.resume() == stop_at
        run.train()
        run.close()
    assert all(torch.equal(value, task.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    assert [r.data for r in folder.read_plans()] == [r.data for r in whole.read_plans()]
    measured = [
        [(r.type, r.step, r.data.get("loss"), r.data.get("values")) for r in f.read_records()] for f in (folder, whole)
    ]
    assert measured[0] == measured[1]


def test_preparing_is_done_once_and_trains_nothing(task: PreparedTask) -> None:
    before = copy.deepcopy(task.model.state_dict())
    run = Run(task, Config(**CONFIG), SETTINGS)
    plan = run.prepare()
    assert run.prepare() is plan
    assert run.batches_in_full == 28  # 108 training rows: 14 batches an epoch
    run.close()
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_evaluation_is_booked_outside_the_budget(task: PreparedTask) -> None:
    run = Run(task, Config(**CONFIG), SETTINGS)
    run.evaluate(task.validation or [])
    run.close()
    assert run.guide.ledger.seconds["evaluation"] > 0.0
    assert run.guide.ledger.spent_flops == 0.0
