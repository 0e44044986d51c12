"""Extra evaluations leave a run as it would have been: weights, ledger and seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import rgft.bench.runner
from rgft.bench.experiment import Cell, Contender, Experiment
from rgft.bench.measures import Extra
from rgft.bench.measures.forgetting import GeneralQuality
from rgft.bench.measures.settings import SOURCES
from rgft.bench.measures.weights import StartingPoint
from rgft.errors import DataError
from rgft.run import Run
from rgft.tasks.base import PreparedTask
from tests.unit.bench.tiny_texts import in_place_of_bench_task

EVERYTHING = Extra(at=(0.2, 0.5, 0.9), each_epoch=True, weights=True, general_texts=8)

CONTENDERS: dict[str, dict[str, Any]] = {
    "rgft": {"method": "rgft"},
    "cached": {
        "method": "cut",
        "settings": {"config": {"mask": {"name": "budget", "frozen_fraction": 0.5}, "execution": {"cache": "memory"}}},
    },
    "pruned": {
        "method": "rgft",
        "settings": {"config": {"examples": {"prune": 0.3}, "mask": {"name": "budget", "frozen_fraction": 0.0}}},
    },
    "pairs": {"method": "rgft", "settings": {"config": {"update": {"low_rank": {"rank": 2}}}}},
    "full": {"method": "full"},
    "lora": {"method": "lora", "settings": {"rank": 2}},
    "lisa": {"method": "lisa", "settings": {"config": {"policy": {"name": "lisa", "layers": 1}}}},
}


def run(monkeypatch: pytest.MonkeyPatch, name: str, extra: Extra, **settings: Any) -> tuple[dict[str, Any], Any]:
    made: list[PreparedTask] = []
    monkeypatch.setattr(rgft.bench.runner, "bench_task", in_place_of_bench_task(made))
    contender = Contender(label=name, budget=0.7, lrs=(1e-3,), **CONTENDERS[name])
    experiment = Experiment(
        name="x", task={}, run={"epochs": 3.0, "batch_size": 8, **settings}, config={}, contenders=(contender,),
        tuning_seeds=(), seeds=(1,), evaluate=extra,
    )  # fmt: skip
    result = rgft.bench.runner.run_cell(experiment, Cell(contender=contender, lr=1e-3, seed=1, is_final=True))
    return result, made[0].model.state_dict()


def without_times(ledger: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in ledger.items() if key not in ("seconds", "energy", "memory")}
    return {**kept, "flops": {key: value for key, value in ledger["flops"].items() if key != "evaluation"}}


@pytest.mark.parametrize("name", CONTENDERS)
def test_weights_and_ledger_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain, weights = run(monkeypatch, name, Extra())
    watched, watched_weights = run(monkeypatch, name, EVERYTHING)
    assert len(watched["measures"]["along"]) >= 4
    assert weights.keys() == watched_weights.keys()
    assert all(torch.equal(value, watched_weights[key]) for key, value in weights.items())
    assert without_times(plain["ledger"]) == without_times(watched["ledger"])
    for key in ("metrics", "plans", "error_map", "map_history", "steps"):
        assert plain[key] == watched[key]
    assert plain["measures"] == {}


def test_with_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights = run(monkeypatch, "rgft", Extra(), accumulation=2)
    _, watched = run(monkeypatch, "rgft", EVERYTHING, accumulation=2)
    assert all(torch.equal(value, watched[key]) for key, value in weights.items())


def test_their_time_is_not_the_runs_and_their_flops_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, _ = run(monkeypatch, "full", EVERYTHING)
    evaluate = rgft.run.evaluate

    def slow(*args: Any, **kwargs: Any) -> dict[str, float]:
        time.sleep(1.0)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(rgft.run, "evaluate", slow)
    result, _ = run(monkeypatch, "full", EVERYTHING)
    points = result["measures"]["along"]
    assert len(points) >= 4
    assert result["ledger"]["seconds"]["evaluation"] > len(points)
    assert result["seconds"] < quick["seconds"] + 0.5 * len(points)
    assert points[-1]["seconds"] < quick["seconds"] + 0.5 * len(points)
    # Points, the validation and the test split: all are the same 16 texts.
    of_one = points[0]["evaluation"]["flops"]
    assert of_one > 0.0
    assert result["ledger"]["flops"]["evaluation"] == pytest.approx(of_one * (len(points) + 2))


def test_points_are_in_order_and_the_last_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(monkeypatch, "full", Extra(at=(0.5,), each_epoch=True))
    points = result["measures"]["along"]
    assert [p["progress"] for p in points] == sorted(p["progress"] for p in points)
    # 0.7 of three epochs: half of the budget, the first and the second epoch, the end
    assert [int(p["epochs"]) for p in points] == [1, 1, 2, 2]
    assert points[-1]["metrics"] == result["metrics"]["validation"]
    assert points[-1]["fraction_of_full"] == pytest.approx(result["ledger"]["flops"]["fraction_of_full"])


def test_tuning_runs_look_at_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PreparedTask] = []
    monkeypatch.setattr(rgft.bench.runner, "bench_task", in_place_of_bench_task(made))
    contender = Contender(label="full", method="full", budget=0.2, lrs=(1e-3,))
    experiment = Experiment(
        name="x", task={}, run={"epochs": 1.0, "batch_size": 8}, config={}, contenders=(contender,), tuning_seeds=(1,),
        seeds=(), evaluate=Extra(at=(0.5,), weights=True, other_domains=("imdb",)),
    )  # fmt: skip
    result = rgft.bench.runner.run_cell(experiment, Cell(contender=contender, lr=1e-3, seed=1, is_final=False))
    assert result["measures"] == {}
    assert "test" not in result["metrics"]


def test_a_contender_may_be_asked_for_something_else_than_the_experiment_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rgft.bench.runner, "bench_task", in_place_of_bench_task([]))
    own = Contender(label="own", method="full", budget=0.2, lrs=(1e-3,), evaluate=Extra(weights=True))
    none = Contender(label="none", method="full", budget=0.2, lrs=(1e-3,), evaluate=Extra())
    plain = Contender(label="plain", method="full", budget=0.2, lrs=(1e-3,))
    experiment = Experiment(
        name="x", task={}, run={"epochs": 1.0, "batch_size": 8}, config={}, contenders=(own, none, plain),
        tuning_seeds=(), seeds=(1,), evaluate=Extra(at=(0.5,)),
    )  # fmt: skip
    measured = [
        set(rgft.bench.runner.run_cell(experiment, Cell(contender=c, lr=1e-3, seed=1, is_final=True))["measures"])
        for c in experiment.contenders
    ]
    assert measured == [{"weights"}, set(), {"along"}]


def test_other_domains_are_evaluated_without_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(tokenizer: Any) -> list[tuple[list[int], str]]:
        words = ["good a b c d e f g", "bad a a a a a a a", "good 0 0 0", "good j j j j j j j"]
        return [(tokenizer(text)["input_ids"], text.split()[0]) for text in words] + [([2, 7, 3], "other")]

    monkeypatch.setitem(SOURCES, "imdb", texts)  # type: ignore[misc]
    result, _ = run(monkeypatch, "full", Extra(other_domains=("imdb",)))
    found = result["measures"]["other_domains"]["imdb"]
    assert found["left_out"] == {"seen": 0, "without": 1}
    assert found["examples"] == found["data"]["examples"] == 4
    assert 0.0 <= found["metrics"]["accuracy"] <= 1.0


def test_one_class_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(tokenizer: Any) -> list[tuple[list[int], str]]:
        return [(tokenizer("good a b c d e f g")["input_ids"], "good")]

    monkeypatch.setitem(SOURCES, "imdb", texts)  # type: ignore[misc]
    result, _ = run(monkeypatch, "full", Extra(other_domains=("imdb",)))
    found = result["measures"]["other_domains"]["imdb"]
    assert "matthews" not in found["metrics"]
    assert "fewer than two classes" in found["undefined"]["matthews"]


def test_a_measure_that_fails_after_the_run_says_so_and_leaves_the_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("encoder.layer.0")

    monkeypatch.setattr(StartingPoint, "compare", fails)
    monkeypatch.setattr(GeneralQuality, "compare", lambda *_: {"similarity_drift": float("nan")})
    with caplog.at_level("ERROR", logger="rgft"):
        result, _ = run(monkeypatch, "full", Extra(weights=True, general_texts=8))
    assert result["metrics"]["test"]["accuracy"] >= 0.0
    assert result["measures"]["weights"] == {"undefined": "KeyError: 'encoder.layer.0'"}
    assert "not JSON compliant" in result["measures"]["general"]["undefined"]
    assert "Traceback" in caplog.text
    assert "in fails" in caplog.text


def test_texts_that_cannot_be_had_are_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tokenizer: Any) -> Any:
        raise DataError("the package is not installed")

    monkeypatch.setitem(SOURCES, "imdb", missing)  # type: ignore[misc]
    monkeypatch.setattr(Run, "train", lambda _: pytest.fail("the run has begun"))
    with pytest.raises(DataError, match="not installed"):
        run(monkeypatch, "full", Extra(other_domains=("imdb",)))
