import json
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.experiment import Cell, Experiment, Results
from rgft.bench.methods import METHODS, Followed, method
from rgft.errors import ConfigError, DataError


def description(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x", "task": {}, "run": {}, "config": {}, "tuning_seeds": [100], "seeds": [0, 1],
        "contenders": [
            {"label": "a", "method": "rgft", "budget": 0.3, "lrs": [1e-4, 2e-4]},
            {"label": "b", "method": "full", "budget": 1.0, "lrs": [1e-4], "seeds": [1]},
        ],
        **changes,
    }  # fmt: skip


def loaded(tmp_path: Path, **changes: Any) -> Experiment:
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(description(**changes)))
    return Experiment.load(path)


def result(loss: float) -> dict[str, Any]:
    return {"metrics": {"validation": {"loss": loss}, "test": {"loss": -loss}}}


def test_learning_rates_are_chosen_on_validation(tmp_path: Path) -> None:
    experiment, results = loaded(tmp_path), Results(tmp_path / "results")
    a, b = experiment.contenders
    tuning = list(experiment.tuning_cells(a))
    assert [(c.contender.label, c.lr, c.seed) for c in tuning] == [("a", 1e-4, 100), ("a", 2e-4, 100)]
    assert list(experiment.tuning_cells(b)) == []
    results.write(tuning[0], result(0.5))
    assert results.best_lr(experiment, a) is None
    results.write(tuning[1], result(0.4))
    assert (results.best_lr(experiment, a), results.best_lr(experiment, b)) == (2e-4, 1e-4)
    results.write(tuning[1], {"metrics": {}, "diverged": "step 3"})
    assert results.best_lr(experiment, a) == 1e-4
    results.write(tuning[0], {"metrics": {}, "diverged": "step 2"})
    assert results.best_lr(experiment, a) is None
    final = [(c.contender.label, c.lr, c.seed) for c in experiment.final_cells(a, 1e-4)]
    assert final == [("a", 1e-4, 0), ("a", 1e-4, 1)]
    assert [c.seed for c in experiment.final_cells(b, 1e-4)] == [1]


def test_contenders_may_be_shared_and_spread_over_budgets(tmp_path: Path) -> None:
    shared = [{"label": "a", "method": "rgft", "lrs": [1e-4]}, {"label": "b", "method": "full", "lrs": [1e-4]}]
    (tmp_path / "methods.json").write_text(json.dumps(shared))
    experiment = loaded(tmp_path, contenders="methods.json", budgets=[0.05, 1.0])
    found = [(c.label, c.method, c.budget) for c in experiment.contenders]
    assert found == [("a-0.05", "rgft", 0.05), ("b-0.05", "full", 0.05), ("a-1", "rgft", 1.0), ("b-1", "full", 1.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": [{"label": "a", "method": "full", "lrs": [1e-4]}]}, "a: the key 'budget' is missing"),
        ({"contenders": [{"label": "a", "method": "full", "lr": 1e-4, "budget": 1.0}]}, "a: unknown key 'lr'"),
        ({"budgets": [0.1]}, "b: expected no budget beside the experiment's budgets"),
        (
            {"contenders": [{"label": "a", "method": "full", "budget": 1.0, "lrs": [1e-4]}] * 2},
            "found a more than once",
        ),
        ({"contenders": "missing.json"}, "expected a list of contenders"),
        ({"contenders": {"label": "a"}}, "expected a list of contenders, found"),
        (
            {"contenders": [{"label": "a", "method": "full", "budget": 1.0, "lrs": 1e-4}]},
            "a: expected lrs to be a list",
        ),
        ({"budgets": []}, "expected budgets to be a list of numbers"),
        ({"budgets": 0.3}, "expected budgets to be a list of numbers"),
        ({"tuning_seeds": []}, "expected tuning_seeds"),
    ],
)
def test_what_is_wrong_with_contenders_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, **changes)


def test_results_are_found_again_and_damaged_ones_are_not_used(tmp_path: Path) -> None:
    results = Results(tmp_path)
    cell = Cell(contender=loaded(tmp_path).contenders[0], lr=1e-4, seed=3, is_final=True)
    assert results.read(cell) is None
    results.write(cell, {"x": 1.5})
    assert results.read(cell) == {"x": 1.5}
    results.path(cell).write_text('{"x": 1.')
    with pytest.raises(DataError, match="delete it"):
        results.read(cell)


def test_all_problems_of_an_experiment_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "experiment.json"
    broken = description(sedes=[1])
    del broken["task"]
    path.write_text(json.dumps(broken))
    with pytest.raises(ConfigError) as caught:
        Experiment.load(path)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="disjoint"):
        loaded(tmp_path, seeds=[100])
    with pytest.raises(ConfigError, match="expected an experiment"):
        Experiment.load(tmp_path / "missing.json")


def test_unknown_method_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora"):
        method("lroa")
    with pytest.raises(ConfigError, match="rgft"):
        loaded(tmp_path, contenders=[{"label": "a", "method": "rgtf", "budget": 0.3, "lrs": [1e-4]}])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_valid_configuration(name: str) -> None:
    config = METHODS[name].configuration(
        budget=0.3, seed=1, settings={"config": {"classifier_lr_multiplier": 10.0}}, followed=Followed()
    )
    assert config.budget is not None
    assert (config.budget.flops, config.seed, config.classifier_lr_multiplier) == (0.3, 1, 10.0)
