"""Methods that follow a run of RGFT: its last plan, its mean rate; and where that run comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.earlier import earlier_result
from rgft.bench.experiment import Cell, Contender, Experiment
from rgft.bench.methods import METHODS, method
from rgft.bench.methods.after_rgft import last_plan, mean_rate
from rgft.errors import ConfigError, DataError
from rgft.plan import UpdatePlan
from rgft.tasks.fingerprint import Data
from tests.unit.bench.tiny_task import prepared, trained


def plan(step: int, **multipliers: float) -> dict[str, Any]:
    return UpdatePlan(step=step, multipliers=multipliers, cut=0).to_dict()


DATA: Data = {"train": {"examples": 8, "sha256": "0"}}
RESULT = {"plans": [plan(4, a=0.0, b=1.5), plan(6, a=0.5, b=0.5)], "steps": 10}


def test_the_mean_is_over_steps_and_what_is_on() -> None:
    assert mean_rate(RESULT, {}).lr_factor == pytest.approx((4 * 1.0 + 2 * 1.5 + 4 * 0.5) / 10)
    for follow in (last_plan, mean_rate):
        with pytest.raises(DataError, match="without plans"):
            follow({"plans": [], "steps": 3}, {})


def test_one_rate_for_all_differs_in_the_multipliers_alone() -> None:
    found = UpdatePlan(
        step=3, multipliers={"embeddings": 0.0, "a": 0.5, "b": 1.5}, cut=1, periods={"b": 2}, reason="decided"
    )
    result = {"plans": [found.to_dict()], "steps": 10}
    with_own, alike = (follow(result, {}).config["policy"]["plan"] for follow in (last_plan, mean_rate))
    assert alike["multipliers"] == {"embeddings": 0.0, "a": 1.0, "b": 1.0}
    assert {**alike, "multipliers": with_own["multipliers"]} == with_own
    settings = [
        method(name).configuration(budget=0.3, seed=0, settings={}, followed=follow(result, {})).to_dict()
        for name, follow in (("rgft_static", last_plan), ("uniform_rate", mean_rate))
    ]
    assert settings[0] != settings[1]
    assert {**settings[0], "policy": None} == {**settings[1], "policy": None}


def test_the_last_plan_is_in_force_from_the_start() -> None:
    first = trained("cut", epochs=3)
    found = first.run.guide.plans[-1]
    first.run.close()
    assert found.cut > 0
    tried = prepared("rgft_static", epochs=3, followed=last_plan({"plans": [found.to_dict()]}, {}))
    tried.run.train()
    (only,) = tried.run.guide.plans
    assert only.step == 0
    assert only.same_effect(found)
    assert tried.run.guide.ledger.probe_flops == 0.0
    assert tried.run.guide.config.update == first.run.guide.config.update


def an_experiment() -> Experiment:
    return Experiment(
        name="x", task={"train_size": 8}, run={"epochs": 1.0}, config={}, contenders=(), tuning_seeds=(), seeds=()
    )


def a_cell(**settings: Any) -> Cell:
    contender = Contender(label="static", method="rgft_static", budget=0.3, lrs=(1e-3,), settings=settings)
    return Cell(contender=contender, lr=1e-3, seed=7, is_final=True)


def test_rgft_runs_at_the_same_rate_and_seed_and_is_not_tested() -> None:
    seen: list[Cell] = []

    def run_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
        seen.append(cell)
        return {"plans": []}

    cell = a_cell(rgft={"config": {"ffn_blocks": 2}})
    assert earlier_result(an_experiment(), cell, DATA, run_cell) == {"plans": []}
    (cell,) = seen
    assert (cell.contender.method, cell.contender.budget, cell.lr, cell.seed) == ("rgft", 0.3, 1e-3, 7)
    assert cell.contender.settings == {"config": {"ffn_blocks": 2}}
    assert not cell.is_final


def test_a_stored_result_must_be_of_the_same_run(tmp_path: Path) -> None:
    def never(experiment: Experiment, cell: Cell) -> dict[str, Any]:
        raise AssertionError

    experiment, path = an_experiment(), tmp_path / "rgft--seed7.json"
    cell = a_cell(result=str(tmp_path / "rgft--seed{seed}.json"))
    with pytest.raises(DataError, match="expected a result of RGFT"):
        earlier_result(experiment, cell, DATA, never)
    revision = METHODS["rgft"].revision
    stored = {
        "method": "rgft", "task": experiment.task, "run": experiment.run, "seed": 7, "budget": 0.3,
        "contender": "rgft", "lr": 1e-4, "metrics": {},
        "revision": revision, "common_config": {}, "data": DATA, **RESULT,
    }  # fmt: skip
    path.write_text(json.dumps(stored))
    assert earlier_result(experiment, cell, DATA, never) == stored
    path.write_text(json.dumps({**stored, "method": "full", "budget": 0.1}))
    with pytest.raises(DataError, match=r"expected method 'rgft', found 'full'[\s\S]*expected budget 0.3, found 0.1"):
        earlier_result(experiment, cell, DATA, never)
    path.write_text(json.dumps({**stored, "revision": revision + 1, "common_config": {"granularity": "head"}}))
    with pytest.raises(DataError, match=r"revision \d+, found \d+[\s\S]*expected common_config {}, found {'gran"):
        earlier_result(experiment, cell, DATA, never)
    path.write_text(json.dumps({**stored, "data": {"train": {"examples": 9, "sha256": "1"}}}))
    with pytest.raises(DataError, match=r"rgft--seed7.json: measured on other data than the run that follows it"):
        earlier_result(experiment, cell, DATA, never)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"rgft--seed7.json: .* found a damaged file"):
        earlier_result(experiment, cell, DATA, never)
    path.write_text(json.dumps({**stored, "metrics": {}, "diverged": "step 3"}))
    with pytest.raises(DataError, match="found one that diverged: step 3"):
        earlier_result(experiment, cell, DATA, never)
    with pytest.raises(ConfigError, match="searched inside a run"):
        earlier_result(experiment, replace(cell, contender=a_cell(lr="auto").contender), DATA, never)
