"""What a map study measures, against what its words say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.map_study import runner
from rgft.bench.map_study.runner import run_seed
from rgft.bench.map_study.settings import MapStudy
from rgft.bench.map_study.summary import markdown, summarise
from rgft.bench.map_study.worth import gain_of_training_alone, harm_of_undoing, weights_of
from rgft.errors import ConfigError, DataError
from rgft.evaluation import evaluate
from rgft.execution.views import bind
from rgft.partition import partition
from tests.unit.bench.tiny_texts import in_place_of_bench_task, tiny_task

SIGNALS = {"generalising_decrease": {"name": "generalising_decrease"}, "norm": {"name": "grad_norm", "p": 2}}
STUDY = MapStudy(
    name="tiny", task={}, seeds=(0,), signals=SIGNALS, steps=4, alone_steps=2, batch_size=8, lr=1e-3, looks=3,
    probe_size=8, examples=10,
)  # fmt: skip


def test_harm_is_the_loss_with_initial_weights_in_place_and_nothing_stays_moved() -> None:
    task = tiny_task()
    assert task.validation is not None
    held = [task.validation[i] for i in range(len(task.validation))]
    binding = bind(task.model, partition(task.model, "head"))

    def loss() -> float:
        return evaluate(task, held, batch_size=10, loss=task.loss)["loss"]

    initial = weights_of(binding)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameters in binding:
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    trained, before = loss(), weights_of(binding)
    harm = harm_of_undoing(binding, initial, loss, share=0.0)
    assert set(harm) == set(binding.partition.names)
    name = next(n for n in binding.partition.names if "head.1" in n)
    with torch.no_grad():
        for parameter, value in zip(binding.parameters[name], initial[name], strict=True):
            parameter.copy_(value)
    assert harm[name] == loss() - trained
    with torch.no_grad():
        for parameter, value in zip(binding.parameters[name], before[name], strict=True):
            parameter.copy_(value)
    assert all(value == 0.0 for value in harm_of_undoing(binding, initial, loss, share=1.0).values())
    after = weights_of(binding)
    assert all(torch.equal(a, b) for n in before for a, b in zip(before[n], after[n], strict=True))
    binding.restore()


def test_alone_means_one_component_beside_the_classifier_from_the_same_start() -> None:
    task = tiny_task()
    binding = bind(task.model, partition(task.model, "block"))
    start, seen, losses = weights_of(binding), list[set[str]](), iter(range(100))

    def train(on: Any) -> None:
        now = weights_of(binding)
        assert all(torch.equal(a, b) for n in start for a, b in zip(start[n], now[n], strict=True))
        seen.append({c.name for c, params in binding if any(p.requires_grad for p in params)})
        with torch.no_grad():
            for parameter in on:
                parameter.add_(1.0)

    gain = gain_of_training_alone(binding, lambda: float(next(losses)), train)
    heads = {c.name for c, _ in binding if c.kind == "classifier"}
    assert heads
    assert seen[0] == heads
    assert seen[1:] == [heads | {name} for name in gain]
    assert list(gain.values()) == [-float(i) for i in range(1, len(gain) + 1)]  # loss 0 by the classifier alone
    assert set(gain) == set(binding.partition.names) - heads
    after = weights_of(binding)
    assert all(torch.equal(a, b) for n in start for a, b in zip(start[n], after[n], strict=True))
    assert all(p.requires_grad for p in task.model.parameters())
    binding.restore()


def test_looking_moves_nothing_and_maps_are_the_running_means_of_looks() -> None:
    found = run_seed(STUDY, tiny_task(), seed=0)
    other = run_seed(replace(STUDY, looks=5, alone_steps=0), tiny_task(), seed=0)
    assert found["loss"] == other["loss"]
    assert found["harm"] == other["harm"]
    assert other["gain_alone"] == {}
    assert set(found["maps"]) == {"generalising_decrease", "predicted_decrease", "norm"}
    for label, looks in found["maps"].items():
        assert [look["step"] for look in looks] == [0, 2, 4]
        running = dict.fromkeys(looks[0]["scores"], 0.0)
        for look in looks:
            running = {name: 0.9 * value + 0.1 * look["scores"][name] for name, value in running.items()}
        expected = {name: value / (1.0 - 0.9**3) for name, value in running.items()}
        assert found["error_maps"][label] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # A step's decrease on its own batch is larger than on another, at this size by far.
    total = {label: sum(values.values()) for label, values in found["error_maps"].items()}
    assert total["predicted_decrease"] > total["generalising_decrease"]


def test_results_are_summarised_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    for name in ("one", "two"):
        study = replace(STUDY, name=name, seeds=(0, 1))
        assert len(list(runner.run_study(study, tmp_path / name))) == 2
        assert list(runner.run_study(study, tmp_path / name)) == []
    summary = summarise(tmp_path)
    assert summary.seeds == {"one": 2, "two": 2}
    # The studies differ by their names alone.
    assert summary.answers["one"] == summary.answers["two"]
    assert summary.likeness["norm"].within["one"] == pytest.approx(summary.likeness["norm"].within["two"])
    assert set(summary.over_time["one"]["norm"]) == {0, 2, 4}
    text = markdown(summary)
    assert "| norm |" in text
    assert "harm of a reset" in text
    json.dumps(summary.to_dict())


def test_stored_results_of_other_settings_or_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = replace(STUDY, alone_steps=0)
    (path,) = runner.run_study(study, tmp_path)
    monkeypatch.setattr(runner, "run_seed", lambda study, task, *, seed: {"seed": seed})
    with pytest.raises(
        DataError, match=r"seed0.json: .* 'lr' \(0.01\), found one with 0.001\n.* 'steps' \(9\), found one"
    ):
        list(runner.run_study(replace(study, lr=1e-2, steps=9), tmp_path))
    more = replace(study, seeds=(0, 1))
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "data": {**stored["data"], "train": {"examples": 1, "sha256": "0"}}}))
    with pytest.raises(DataError, match=r"seed0.json: measured on other data than the data of now \(train: 1 examples"):
        list(runner.run_study(more, tmp_path))
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "data"}))  # as it was before
    assert [new.name for new in runner.run_study(more, tmp_path)] == ["map-study--seed1.json"]
    for text in ('{"seed": 0, "da', "{}", "[]"):
        path.write_text(text)
        with pytest.raises(DataError, match="found a damaged file"):
            list(runner.run_study(study, tmp_path))


def test_a_study_s_data_are_checked_where_no_seed_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = replace(STUDY, alone_steps=0)
    (path,) = runner.run_study(study, tmp_path)
    assert list(runner.run_study(study, tmp_path)) == []
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "data": {**stored["data"], "train": {"examples": 1, "sha256": "0"}}}))
    with pytest.raises(DataError, match="measured on other data than the data of now"):
        list(runner.run_study(study, tmp_path))

    def missing(settings: Any, *, seed: int) -> Any:
        raise DataError("no such package")

    monkeypatch.setattr(runner, "bench_task", missing)
    assert list(runner.run_study(study, tmp_path)) == []
    with pytest.raises(DataError, match="no such package"):
        list(runner.run_study(replace(study, seeds=(0, 1)), tmp_path))


def test_all_problems_of_a_study_at_once(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps({"name": "x", "tsak": {}, "seeds": [0]}))
    with pytest.raises(ConfigError) as caught:
        MapStudy.load(path)
    assert len(caught.value.problems) == 2
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"study.json: expected a map study, an object"):
        MapStudy.load(path)
    path.write_text(
        json.dumps({"name": "x", "task": {}, "seeds": [0, 0], "looks": 1, "signals": {"a": {"name": "nor"}}})
    )
    with pytest.raises(ConfigError) as caught:
        MapStudy.load(path)
    assert len(caught.value.problems) == 3


def test_the_control_is_drawn_anew_for_each_seed() -> None:
    study = replace(STUDY, signals={"random": {"name": "random"}}, steps=1, looks=2, alone_steps=0)
    one, other = (run_seed(study, tiny_task(), seed=seed)["error_maps"]["random"] for seed in (0, 1))
    assert one != other


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(DataError, match="probe_size 32"):
        run_seed(replace(STUDY, probe_size=32), tiny_task(), seed=0)


@pytest.mark.parametrize("path", sorted(Path("benchmarks/map_studies").glob("*.json")), ids=lambda path: path.stem)
def test_committed_studies_can_be_read(path: Path) -> None:
    assert MapStudy.load(path).seeds
