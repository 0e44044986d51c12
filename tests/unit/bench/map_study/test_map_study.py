"""What a map study measures, against what its words say."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.claims import claim
from rgft.bench.map_study import runner
from rgft.bench.map_study.runner import run_seed
from rgft.bench.map_study.settings import MapStudy
from rgft.bench.map_study.summary import favoured_by, markdown, summarise
from rgft.bench.map_study.worth import gain_of_training_alone, harm_of_moving, weights_of
from rgft.bench.runner import Conditions
from rgft.errors import ConfigError, DataError, NonFiniteError
from rgft.evaluation import evaluate
from rgft.execution.views import bind
from rgft.partition import partition
from rgft.tasks.base import PreparedTask
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
    harm = harm_of_moving(binding, initial, loss, share=0.0)
    assert set(harm) == set(binding.partition.names)
    name = next(n for n in binding.partition.names if "head.1" in n)
    with torch.no_grad():
        for parameter, value in zip(binding.parameters[name], initial[name], strict=True):
            parameter.copy_(value)
    assert harm[name] == loss() - trained
    with torch.no_grad():
        for parameter, value in zip(binding.parameters[name], before[name], strict=True):
            parameter.copy_(0.5 * value)
    scaled = loss() - trained
    with torch.no_grad():
        for parameter, value in zip(binding.parameters[name], before[name], strict=True):
            parameter.copy_(value)
    assert all(value == 0.0 for value in harm_of_moving(binding, initial, loss, share=1.0).values())
    zero = {n: [torch.zeros_like(value) for value in values] for n, values in initial.items()}
    assert harm_of_moving(binding, zero, loss, share=0.5)[name] == scaled != harm[name]
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
    assert set(found["harm"]) == {"reset", "halved", "scaled"}
    assert all(set(harm) == {component["name"] for component in found["components"]} for harm in found["harm"].values())
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
        outcomes = list(runner.run_studies([study], tmp_path))
        assert [(outcome.path.parent.name, outcome.failure) for outcome in outcomes] == [(name, "")] * 2
        assert list(runner.run_studies([study], tmp_path)) == []
    summary = summarise(tmp_path)
    (stored, _) = (json.loads(path.read_text()) for path in sorted((tmp_path / "one").glob("*.json")))
    body = {c["name"] for c in stored["components"] if not c["is_classifier"]}
    assert summary.components["one"] == len(body)
    assert summary.seeds == {"one": 2, "two": 2}
    # The studies differ by their names alone.
    assert summary.answers["one"] == summary.answers["two"]
    assert summary.likeness["norm"].within["one"] == pytest.approx(summary.likeness["norm"].within["two"])
    assert set(summary.over_time["one"]["norm"]) == {0, 2, 4}
    # Of four runs that are alike two by two, no dealing out tells them apart.
    assert summary.likeness["norm"].p == 1.0
    norms = [
        json.loads((tmp_path / "one" / f"map-study--seed{seed}.json").read_text())["error_maps"]["norm"]
        for seed in (0, 1)
    ]
    for favoured in summary.favoured["one"]["norm"]:
        ranks = [sorted((v for n, v in norm.items() if n in body), reverse=True) for norm in norms]
        assert favoured.seeds == sum(
            norm[favoured.component] >= rank[2] for norm, rank in zip(norms, ranks, strict=True)
        )
    assert sum(favoured.seeds for favoured in summary.favoured["one"]["norm"]) == 6
    answer = summary.answers["one"]["norm"]["E at the end, harm of scaling"]
    assert (answer.seeds, answer.over) == (2, "seeds and components")
    text = markdown(summary)
    assert "| norm |" in text
    assert "harm of a reset" in text
    json.dumps(summary.to_dict())


def stored_study(name: str, seeds: int, folder: Path) -> Path:
    """A folder with results that were committed."""
    (folder / name).mkdir()
    for seed in range(seeds):
        file = f"map-study--seed{seed}.json"
        (folder / name / file).write_text((Path("benchmarks/results") / name / file).read_text())
    return folder / name


def test_committed_studies_are_summarised(tmp_path: Path) -> None:
    (rows,) = summarise(stored_study("map_study_bbc", 2, tmp_path)).answers.values()
    row = rows["generalising_decrease"]
    assert row["E at the end, harm of scaling"].rho == pytest.approx(-0.21, abs=0.005)
    assert row["E at the end, harm of a reset"].rho == pytest.approx(-0.38, abs=0.005)
    text = markdown(summarise(stored_study("map_study_rotten_tomatoes", 1, tmp_path)))
    assert "| generalising_decrease | +0.47 [-0.22, +0.94]° |" in text
    assert "°: one seed, over components alone: nothing is known of seeds" in text
    both = markdown(summarise(tmp_path))
    assert "| gain alone | bert.encoder.layer.4.ffn 2/2, bert.encoder.layer.3.ffn 2/2, bert.encoder.layer.5." in both
    assert "| gain alone | +0.97 | undefined | +0.45 | +0.52 | 0.333 (≥ 0.333) |" in both


def test_stored_results_of_other_settings_or_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = replace(STUDY, alone_steps=0)
    path = next(runner.run_studies([study], tmp_path)).path
    monkeypatch.setattr(runner, "run_seed", lambda study, task, *, seed: {"seed": seed, "settings": {}})
    with pytest.raises(
        DataError, match=r"seed0.json: .* 'lr' \(0.01\), found one with 0.001\n.* 'steps' \(9\), found one"
    ):
        list(runner.run_studies([replace(study, lr=1e-2, steps=9)], tmp_path))
    more = replace(study, seeds=(0, 1))
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "data": {**stored["data"], "train": {"examples": 1, "sha256": "0"}}}))
    other = replace(study, name="other")
    ran, failed = runner.run_studies([more, other], tmp_path)  # what is wrong with a study is said at the end
    assert failed.path == path.parent
    assert "seed0.json: measured on other data than the data of now (train: 1 examples" in failed.failure
    assert (ran.path.parent.name, ran.failure) == ("other", "")
    assert not (path.parent / "map-study--seed1.json").exists()
    path.write_text(json.dumps({key: value for key, value in stored.items() if key != "data"}))  # as it was before
    assert [new.path.name for new in runner.run_studies([more], tmp_path)] == ["map-study--seed1.json"]
    for text in ('{"seed": 0, "da', "{}", "[]"):
        path.write_text(text)
        with pytest.raises(DataError, match="found a damaged file"):
            list(runner.run_studies([study], tmp_path))


def test_a_seed_that_another_sitting_is_at_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    monkeypatch.setattr(runner, "run_seed", lambda study, task, *, seed: {"seed": seed, "settings": {}})
    study = replace(STUDY, alone_steps=0, seeds=(0, 1))
    (tmp_path / study.name).mkdir()
    held = claim(tmp_path / study.name / "map-study--seed0.json")
    assert held is not None
    assert [made.path.name for made in runner.run_studies([study], tmp_path)] == ["map-study--seed1.json"]
    held.release()
    assert [path.name for path in (tmp_path / study.name).iterdir()] == ["map-study--seed1.json"]


def test_a_seed_that_diverges_leaves_the_others_of_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_seed(study: MapStudy, task: PreparedTask, *, seed: int) -> dict[str, Any]:
        if seed == 0:
            raise NonFiniteError("the loss is nan")
        return {"seed": seed, "settings": {}}

    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    monkeypatch.setattr(runner, "run_seed", run_seed)
    first, second = runner.run_studies([replace(STUDY, alone_steps=0, seeds=(0, 1))], tmp_path)
    assert "the loss is nan" in first.failure
    assert (second.path.name, second.failure) == ("map-study--seed1.json", "")
    assert second.path.exists()


def test_results_without_what_a_summary_needs_are_named(tmp_path: Path) -> None:
    folder = stored_study("map_study_bbc", 1, tmp_path)
    path = folder / "map-study--seed0.json"
    stored = json.loads(path.read_text())
    del stored["harm"]["scaled"]  # as results were before components were scaled
    path.write_text(json.dumps(stored))
    (rows,) = summarise(folder).answers.values()
    assert rows["generalising_decrease"]["E at the end, harm of scaling"].rho is None
    assert rows["generalising_decrease"]["E at the end, harm of a reset"].rho is not None
    path.write_text(json.dumps({"schema": runner.SCHEMA}))
    with pytest.raises(
        DataError, match=r"map-study--seed0.json: .* found a damaged file \(without seed, settings, study"
    ):
        runner.results_by_study(tmp_path)


def test_a_damaged_file_of_another_kind_does_not_stop_a_summary(tmp_path: Path) -> None:
    stored_study("map_study_bbc", 2, tmp_path)
    (tmp_path / "rgft--final--lr1--seed0.json").write_text('{"seed": 0, "da')
    assert list(runner.results_by_study(tmp_path)) == ["map_study_bbc"]


def test_a_study_s_data_are_checked_where_no_seed_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = replace(STUDY, alone_steps=0)
    (made,) = runner.run_studies([study], tmp_path)
    path = made.path
    assert list(runner.run_studies([study], tmp_path)) == []
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "data": {**stored["data"], "train": {"examples": 1, "sha256": "0"}}}))
    (failed,) = runner.run_studies([study], tmp_path)
    assert "measured on other data than the data of now" in failed.failure

    def missing(settings: Any, *, seed: int) -> Any:
        raise DataError("no such package")

    monkeypatch.setattr(runner, "bench_task", missing)
    assert list(runner.run_studies([study], tmp_path)) == []
    (failed,) = runner.run_studies([replace(study, seeds=(0, 1))], tmp_path)
    assert "no such package" in failed.failure


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


@pytest.mark.parametrize("path", sorted(Path("benchmarks/map_studies").rglob("*.json")), ids=lambda path: path.stem)
def test_committed_studies_can_be_read(path: Path) -> None:
    assert MapStudy.load(path).seeds


def test_a_study_computes_where_its_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that keeps no values, whose first loss ends it."""
    task, seen = tiny_task(), list[set[str]]()
    loss = task.loss

    def noted(model: Any, batch: Any) -> Any:
        seen.append({value.device.type for value in batch.values() if isinstance(value, torch.Tensor)})
        return loss(model, batch)

    task.loss = noted
    task.model.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        run_seed(STUDY, task, seed=0)
    assert seen == [{"meta"}]


def test_seeds_side_by_side_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    study = replace(STUDY, alone_steps=0, seeds=(0, 1, 2))
    seeds = runner._Seeds(study, tmp_path / "tiny", Conditions(jobs=2))
    job = seeds.take()
    assert job is not None
    assert pickle.loads(pickle.dumps(job.make))() is None  # what a process of its own gets
    stored = json.loads(job.path.read_text())
    assert (stored["device"], stored["jobs"], stored["seed"]) == ("cpu", 2, 0)
    job.end(None)
    later = seeds.take()
    assert later is not None
    assert (later.path.name, later.seconds) == ("map-study--seed1.json", stored["seconds"])
    seeds.close()  # what it was at is another sitting's now
    # The first is begun, however long it takes; no other that would end too late is.
    begun = runner.run_studies([study], tmp_path, stop_after_seconds=stored["seconds"] / 2)
    assert [outcome.path.name for outcome in begun] == ["map-study--seed1.json"]
    with pytest.raises(ConfigError, match="studies with names of their own, found tiny"):
        list(runner.run_studies([study, study], tmp_path))


def test_a_seed_that_cannot_be_run_leaves_out_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "bench_task", in_place_of_bench_task([]))
    (outcome,) = runner.run_studies([replace(STUDY, probe_size=32, seeds=(0, 1))], tmp_path)
    assert "probe_size 32" in outcome.failure


def test_components_that_a_map_has_alike_are_not_favoured_by_their_order() -> None:
    tied = {"a": 2.0, "b": 0.0, "c": 0.0, "d": 0.0, "e": 0.0}
    clear = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 0.0}
    alike = dict.fromkeys(tied, 1.0)
    found = favoured_by([tied, clear, alike])
    assert [(one.component, one.seeds, one.of) for one in found] == [("a", 2, 2), ("b", 1, 2)]
