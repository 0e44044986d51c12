import json
import re
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.experiment import Cell, Experiment
from rgft.bench.methods import METHODS, Followed, method
from rgft.bench.results import Results
from rgft.config import StageConfig
from rgft.errors import ConfigError, DataError


def description(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x", "task": {}, "run": {}, "config": {}, "tuning_seeds": [100], "seeds": [0, 1],
        "max_extensions": 0,
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


def test_contenders_may_be_shared_and_spread_over_budgets(tmp_path: Path) -> None:
    shared = [{"label": "a", "method": "rgft", "lrs": [1e-4]}, {"label": "b", "method": "full", "lrs": [1e-4]}]
    (tmp_path / "methods.json").write_text(json.dumps(shared))
    experiment = loaded(tmp_path, contenders="methods.json", budgets=[0.05, 1.0])
    found = [(c.label, c.method, c.budget) for c in experiment.contenders]
    assert found == [("a-0.05", "rgft", 0.05), ("b-0.05", "full", 0.05), ("a-1", "rgft", 1.0), ("b-1", "full", 1.0)]


def contender(**changes: Any) -> dict[str, Any]:
    return {"label": "a", "method": "full", "budget": 1.0, "lrs": [1e-4], **changes}


def problems_of(tmp_path: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **changes)
    return [problem.removeprefix(f"{tmp_path}/experiment.json: ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "a/b"}, "label: expected a name of letters, digits and"),
        ({"label": "a--b"}, "label: expected a name of letters, digits and"),
        ({"method": "rgtf"}, "did you mean|nearest"),
        ({"budget": None}, "budget: expected a valid number, found None"),
        ({"budget": "0.3"}, "budget: expected a valid number, found '0.3'"),
        ({"budget": True}, "budget: expected a valid number, found True"),
        ({"budget": 0}, "budget: expected a number greater than 0, found 0"),
        ({"budget": -1}, "budget: expected a number greater than 0, found -1"),
        ({"budget": 1.5}, "budget: expected a number less than or equal to 1, found 1.5"),
        ({"budget": float("nan")}, "budget: expected a finite number, found nan"),
        ({"lr": 1e-4}, r"lr: there is no such setting \(found 0.0001\); did you mean 'lrs'"),
        ({"lrs": 1e-4}, "lrs: expected a list, found 0.0001"),
        ({"lrs": []}, "lrs: "),
        ({"lrs": [-1e-4]}, "lrs.0: expected a number greater than 0"),
        ({"lrs": [1e-4, 1e-4]}, "lrs: expected each value once"),
        ({"seeds": [1, 1]}, "seeds: expected each value once"),
        ({"seeds": [-1]}, "seeds.0: expected a number greater than or equal to 0"),
        ({"seeds": "12"}, "seeds: expected a list, found '12'"),
        ({"settings": [1]}, r"settings: expected a group of settings, found \[1\]"),
        ({"settings": {"config": 3}}, "settings: expected a group of settings, found {'config': 3}"),
        ({"variants": {"../b": {}}}, "variants.*expected a name of letters"),
        ({"variants": {"b": 1}}, "variants.b: expected a group of settings, found 1"),
        ({"variants": {"b": {"lr": "auto"}}}, "variants.b: expected settings without lr.*found 'auto'"),
        ({"variants": "method"}, "variants: expected none of full, which has no key setting; found 'method'"),
        ({"variants": "methods"}, "variants: expected a group of settings or 'method', found 'methods'"),
    ],
)
def test_what_is_wrong_with_a_contender_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(tmp_path, contenders=[contender(**changes)])
    assert problem.startswith(f"contenders.0 ({changes.get('label', 'a')}): ")
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../evil"}, "name: expected a name of letters, digits and .*, found '../../evil'"),
        ({"task": "bbc"}, "task: expected a group of settings, found 'bbc'"),
        ({"run": {"epoch": 3}}, "run: expected settings of a run .*, found epoch"),
        (
            {"contenders": [contender(method="lora", settings={"rnak": 64})]},
            r"a: settings.rnak: there is no such setting \(found 64\); nearest: rank",
        ),
        ({"run": {"lr": 3}}, "run: expected settings of a run .*, found lr"),
        ({"tuning_seeds": 100}, "tuning_seeds: expected a list, found 100"),
        ({"tuning_seeds": []}, "expected tuning_seeds, since contenders have several rates"),
        (
            {"tuning_seeds": [], "contenders": [contender(variants={"b": {}})]},
            "expected tuning_seeds, since contenders",
        ),
        ({"seeds": [100]}, "seeds: expected to be disjoint with tuning_seeds, found 100 in both"),
        ({"contenders": [contender(seeds=[7, 100])]}, "a: seeds: expected to be disjoint .* found 100 in both"),
        ({"contenders": [contender()] * 2}, "expected labels of their own, found a more than once"),
        ({"contenders": {"label": "a"}}, "contenders: expected a list of contenders, found"),
        ({"contenders": []}, r"contenders: expected a list of contenders, found \[\]"),
        ({"contenders": "missing.json"}, "missing.json: expected a list of contenders in JSON"),
        ({"contenders": [contender()], "budgets": [0.1]}, "budget: expected none beside the experiment's budgets"),
        ({"budgets": 0.3, "contenders": [{}]}, "budgets: expected a list, found 0.3"),
        ({"budgets": [2], "contenders": [{}]}, "budgets.0: expected a number less than or equal to 1, found 2"),
        ({"config": {"beta": 3}, "contenders": [contender()]}, "a: config.beta: there is no such setting"),
        (
            {"contenders": [contender(variants={"b": {"config": {"granularity": "x"}}})]},
            "a: variants.b: config.granularity: expected .*; found 'x'",
        ),
        ({"max_extensions": -1}, "max_extensions: expected a number greater than or equal to 0, found -1"),
        ({"evaluate": {"each_epoch": 1}}, "evaluate.each_epoch: expected true or false, found 1"),
        (
            {"contenders": [contender(evaluate={"each_epoch": 1})]},
            r"contenders.0 \(a\): evaluate.each_epoch: expected true or false, found 1",
        ),
        (
            {"contenders": [contender(label="b"), contender(settings={"lr": [0.1, 0.2]}, evaluate={"at": [0.5]})]},
            "evaluate.at, evaluate.each_epoch: expected one learning rate for each run",
        ),
    ],
)
def test_what_is_wrong_with_an_experiment_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(tmp_path, **changes)
    assert re.search(message, problem)


def test_results_are_found_again_and_damaged_ones_are_not_used(tmp_path: Path) -> None:
    results = Results(tmp_path)
    cell = Cell(contender=loaded(tmp_path).contenders[0], lr=1e-4, seed=3, is_final=True)
    assert results.read(cell) is None
    result = {"contender": "a", "method": "rgft", "budget": 0.3, "lr": 1e-4, "seed": 3, "task": {}, "run": {}}
    results.write(cell, {**result, "metrics": {}, "x": 1.5})
    assert results.read(cell) == {**result, "metrics": {}, "x": 1.5}
    for text, why in (
        ('{"x": 1.', "Expecting"), ("[]", r"\[\] is no object"), ("{}", "without contender, method"),
        (json.dumps(result), "without metrics"), (json.dumps({**result, "metrics": [1]}), "without metrics"),
    ):  # fmt: skip
        results.path(cell).write_text(text)
        with pytest.raises(
            DataError, match=rf"seed3.json: .*found a damaged file \(.*{why}.*; delete it, and run again"
        ):
            results.read(cell)


def test_all_problems_of_an_experiment_file_at_once(tmp_path: Path) -> None:
    without_label = {"method": "full", "budget": 0.0, "lrs": [1e-4]}
    found = problems_of(tmp_path, sedes=[1], seeds=3, contenders=[without_label, contender(budget="1")])
    assert [problem.partition(": expected")[0].partition(": there")[0] for problem in found] == [
        "contenders.0: label", "contenders.0: budget", "contenders.1 (a): budget", "seeds", "sedes",
    ]  # fmt: skip
    unnamed = [{"method": "full", "lrs": [1e-4]}, {"label": 3, "method": "full", "lrs": []}]
    found = problems_of(tmp_path, contenders=unnamed, budgets=[0.1, 0.2])
    assert [problem.partition(": expected")[0] for problem in found] == [
        "contenders.0: label", "contenders.1 (3): label", "contenders.1 (3): lrs",
    ]  # fmt: skip
    path = tmp_path / "experiment.json"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"experiment.json: expected an experiment, an object.*found \[1, 2\]"):
        Experiment.load(path)
    with pytest.raises(ConfigError, match="expected an experiment in JSON"):
        Experiment.load(tmp_path / "missing.json")


def test_every_experiment_of_the_bench_can_be_loaded() -> None:
    paths = sorted(Path("benchmarks/experiments").glob("**/*.json"))
    loadable = [Experiment.load(path).name for path in paths if path.parent.name != "contenders"]
    assert len(loadable) == len(set(loadable)) > 10


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="lora"):
        method("lroa")


def test_a_contenders_groups_keep_what_they_do_not_name(tmp_path: Path) -> None:
    """Of the method's own, and of what the experiment gives to all."""
    settings = {"config": {"execution": {"padding": "all"}, "policy": {"layers": 2}}}
    given = contender(method="last_n_uncached", settings=settings)
    experiment = loaded(tmp_path, config={"execution": {"positions": "all"}}, contenders=[given])
    config = method("last_n_uncached").configuration(
        budget=0.3, seed=0, settings=experiment.with_common("last_n_uncached", experiment.contenders[0].settings)
    )
    execution = config.execution
    assert (execution.cache, execution.positions, execution.padding) == ("none", "all", "all")
    assert config.policy == StageConfig(name="last_n", params={"layers": 2})


def test_variants_of_the_method_itself(tmp_path: Path) -> None:
    given = contender(method="last_n", settings={"config": {"execution": {"cache": "none"}}}, variants="method")
    (read,) = loaded(tmp_path, contenders=[given]).contenders
    assert read.variants == METHODS["last_n"].variants
    assert read.settings_of("layers-4")["config"] == {"execution": {"cache": "none"}, "policy": {"layers": 4}}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.variants])
def test_variants_of_a_method_differ_in_settings_that_it_knows(name: str) -> None:
    chosen = METHODS[name]
    made = [
        (chosen.configuration(budget=0.3, seed=0, settings=settings, followed=Followed()), chosen._own(settings))
        for settings in ({}, *chosen.variants.values())
    ]
    assert not any(chosen.problems_of(settings) for settings in chosen.variants.values())
    assert all(made[i] != made[j] for i in range(len(made)) for j in range(i))


@pytest.mark.parametrize(
    ("name", "own", "multiplier"),
    [("full", {}, 10.0), ("lora", {}, 1.0), ("lora", {"classifier_lr_multiplier": 3.0}, 3.0)],
)  # fmt: skip
def test_a_new_head_trains_at_an_adapter_s_own_rate_unless_a_contender_says_otherwise(
    tmp_path: Path, name: str, own: dict[str, Any], multiplier: float
) -> None:
    given = contender(method=name, settings={"config": own} if own else {})
    experiment = loaded(tmp_path, config={"classifier_lr_multiplier": 10.0}, contenders=[given])
    settings = experiment.with_common(name, experiment.contenders[0].settings)
    assert method(name).configuration(budget=0.3, seed=0, settings=settings).classifier_lr_multiplier == multiplier


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_valid_configuration(name: str) -> None:
    config = METHODS[name].configuration(
        budget=0.3, seed=1, settings={"config": {"classifier_lr_multiplier": 10.0}}, followed=Followed()
    )
    assert config.budget is not None
    assert (config.budget.flops, config.seed, config.classifier_lr_multiplier) == (0.3, 1, 10.0)


def like(tmp_path: Path, **changes: Any) -> Experiment:
    (tmp_path / "experiment.json").write_text(json.dumps(description(task={"name": "cola"})))
    path = tmp_path / "other.json"
    path.write_text(
        json.dumps({"name": "y", "like": "experiment.json", "choose": "score", "contenders": ["b"], **changes})
    )
    return Experiment.load(path)


def test_an_experiment_like_another_differs_in_its_choice_alone(tmp_path: Path) -> None:
    other = like(tmp_path)
    first = Experiment.load(tmp_path / "experiment.json")
    assert (other.name, other.choose, other.like) == ("y", "score", "x")
    assert other.contenders == first.contenders[1:]
    same = {"name": "x", "choose": "loss", "like": None, "contenders": first.contenders}
    assert other.model_copy(update=same) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ["c"]}, r"other\.json: contenders: expected labels of contenders \(a, b\), found c"),
        ({"contenders": []}, r"other\.json: contenders: expected .*at least 1"),
        ({"like": "gone.json"}, r"gone\.json: expected an experiment in JSON"),
        ({"choose": "accuracy"}, r"other\.json: choose: expected 'loss' or 'score', found 'accuracy'"),
        ({"seeds": [7]}, r"other\.json: seeds"),
        ({"name": "x"}, r"other\.json: name: expected another one than that of experiment\.json, found 'x'"),
    ],
)
def test_an_experiment_like_another_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        like(tmp_path, **changes)


def test_a_choice_by_what_is_not_measured_on_validation_data(tmp_path: Path) -> None:
    for task in ("instructions", "code", "summarisation"):
        (problem,) = problems_of(tmp_path, task={"name": task}, choose="score")
        assert problem.startswith("choose: expected 'loss', since this task's score is of what a model writes")
    (problem,) = problems_of(tmp_path, task={"name": "colla"}, choose="score")
    assert problem.startswith("task.name: expected one of the bench's tasks, found 'colla'; nearest: cola")
