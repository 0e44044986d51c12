"""What an experiment still lacks: rates beyond the grid, variants, and final runs that are out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rgft.bench import agenda, sitting
from rgft.bench.experiment import Cell, Choice, Experiment
from rgft.bench.finals import final_results
from rgft.bench.results import Results
from rgft.bench.runner import Conditions, identity_of
from rgft.bench.sitting import run_experiments
from rgft.errors import DataError
from tests.unit.bench.test_experiment import contender, loaded
from tests.unit.bench.tiny_texts import in_place_of_bench_task


def one(tmp_path: Path, **changes: Any) -> Experiment:
    """An experiment with one contender."""
    own = {key: changes.pop(key) for key in ("lrs", "settings", "variants", "method") if key in changes}
    changes = {"run": {"epochs": 1.0}, "task": {"name": "bbc", "train_size": 8}, "seeds": [0], **changes}
    return loaded(tmp_path, contenders=[contender(**{"lrs": [1e-4, 2e-4], **own})], **changes)


def run(experiment: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch, best: float = 1.0) -> list[str]:
    """A sitting whose runs are the better the nearer their rate is to the best one; gives those that were begun."""
    begun: list[str] = []

    def run_cell(experiment: Experiment, cell: Cell, conditions: Conditions) -> dict[str, Any]:
        begun.append(cell.file_name.removesuffix(".json"))
        loss = abs(cell.lr - best) / (2.0 if cell.variant else 1.0)
        metrics = {split: {"loss": loss} for split in ("validation", "test")}
        ledger = {"flops": {"fraction_of_full": 1.0}}
        return {**identity_of(experiment, cell), "metrics": metrics, "ledger": ledger, "steps": 1}

    monkeypatch.setattr(sitting, "run_cell", run_cell)
    assert all(outcome.failure == "" for outcome in run_experiments([experiment], folder))
    return begun


def test_only_the_settled_rate_has_final_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = one(tmp_path, max_extensions=1)
    begun = run(experiment, tmp_path, monkeypatch)
    assert begun == [
        *(f"a--tuning--lr{lr}--seed100" for lr in ("0.0001", "0.0002", "0.0004")),
        "a--final--lr0.0004--seed0",
    ]
    assert run(experiment, tmp_path, monkeypatch) == []


def test_an_extension_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = one(tmp_path, max_extensions=3)
    assert len(run(experiment, tmp_path, monkeypatch, best=8e-4)) == 6
    for gone in ("a--tuning--lr0.0008--seed100", "a--final--lr0.0008--seed0"):
        (tmp_path / "x" / f"{gone}.json").unlink()
    begun = run(experiment, tmp_path, monkeypatch, best=8e-4)
    assert begun == ["a--tuning--lr0.0008--seed100", "a--final--lr0.0008--seed0"]
    changed = one(tmp_path, max_extensions=3, run={"epochs": 2.0})
    with pytest.raises(DataError, match="expected a result with the experiment's 'run'"):
        run(changed, tmp_path, monkeypatch)


def test_final_runs_at_a_rate_that_lost_are_kept_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(one(tmp_path, max_extensions=0), tmp_path, monkeypatch)
    old = tmp_path / "x" / "a--final--lr0.0002--seed0.json"
    before = json.loads(old.read_text())
    begun = run(one(tmp_path, max_extensions=3), tmp_path, monkeypatch, best=4e-4)
    assert begun == ["a--tuning--lr0.0004--seed100", "a--tuning--lr0.0008--seed100", "a--final--lr0.0004--seed0"]
    assert not old.exists()
    kept = tmp_path / "x" / "a--superseded--lr0.0002--seed0.json"
    assert json.loads(kept.read_text()) == {**before, "is_final": False}
    ((finals,),) = final_results(tmp_path).values()
    assert [result["lr"] for result in finals.by_seed.values()] == [4e-4]
    # A second one of this name is kept beside it.
    old.write_text(json.dumps(before))
    assert run(one(tmp_path, max_extensions=3), tmp_path, monkeypatch) == []
    assert len(list((tmp_path / "x").glob("a--superseded--lr0.0002--seed0*.json"))) == 2


def test_where_every_rate_diverges_there_are_no_final_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = one(tmp_path, max_extensions=1)
    results = Results(tmp_path / "x")
    a = experiment.contenders[0]
    for lr in (5e-5, *a.lrs):
        for cell in experiment.tuning_cells(a, Choice(lr=lr)):
            results.write(cell, {**identity_of(experiment, cell), "metrics": {}, "diverged": "step 3"})
    assert run(experiment, tmp_path, monkeypatch) == []
    assert "a: a run diverged at each of its rates" in caplog.text


def test_a_variant_is_named_by_its_files_and_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = one(tmp_path, method="lora", lrs=[1e-4], settings={"rank": 8}, variants={"low": {"rank": 2}})
    begun = run(experiment, tmp_path, monkeypatch)
    assert begun == [
        "a--tuning--lr0.0001--seed100",
        "a--tuning--low--lr0.0001--seed100",
        "a--final--low--lr0.0001--seed0",
    ]
    assert run(experiment, tmp_path, monkeypatch) == []
    stored = json.loads((tmp_path / "x" / f"{begun[-1]}.json").read_text())
    assert (stored["variant"], stored["settings"]) == ("low", {"rank": 2})
    stored = json.loads((tmp_path / "x" / f"{begun[0]}.json").read_text())
    assert ("variant" in stored, stored["settings"]) == (False, {"rank": 8})
    other = one(tmp_path, method="lora", lrs=[1e-4], settings={"rank": 8}, variants={"low": {"rank": 4}})
    with pytest.raises(DataError, match=r"low--lr0.0001--seed100.json: expected .* 'settings' \({'rank': 4}\)"):
        run(other, tmp_path, monkeypatch)


def test_final_runs_of_a_variant_that_lost_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = one(tmp_path, method="lora", lrs=[1e-4], variants={"low": {"rank": 2}})
    without = one(tmp_path, method="lora", lrs=[1e-4])
    assert run(without, tmp_path, monkeypatch) == ["a--final--lr0.0001--seed0"]
    assert run(experiment, tmp_path, monkeypatch)[-1] == "a--final--low--lr0.0001--seed0"
    assert (tmp_path / "x" / "a--superseded--lr0.0001--seed0.json").exists()


def test_another_method_under_the_same_label_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(one(tmp_path, method="lora"), tmp_path, monkeypatch)
    with pytest.raises(
        DataError, match=r"expected a result with the experiment's 'method' \(lora_top\), found .* lora;"
    ):
        run(one(tmp_path, method="lora_top"), tmp_path, monkeypatch)


def test_results_from_before_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = one(tmp_path, method="linear_probe", lrs=[1e-4])
    (name,) = run(experiment, tmp_path, monkeypatch)
    path = tmp_path / "x" / f"{name}.json"
    result = json.loads(path.read_text())
    assert result["revision"] == 1
    path.write_text(json.dumps({key: result[key] for key in result if key not in ("revision", "common_config")}))
    assert run(experiment, tmp_path, monkeypatch) == []


def by_score(tmp_path: Path, labels: tuple[str, ...] = ("a",)) -> Experiment:
    """The experiment `x` with another choice."""
    path = tmp_path / "y.json"
    path.write_text(json.dumps({"name": "y", "like": "experiment.json", "choose": "score", "contenders": list(labels)}))
    return Experiment.load(path)


def test_another_choice_makes_only_the_runs_that_the_first_has_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = one(tmp_path, lrs=[1e-4, 2e-4, 4e-4], seeds=[0, 1])
    run(first, tmp_path, monkeypatch, best=2e-4)  # accuracy is not measured, so that the loss decides
    other = by_score(tmp_path)
    assert run(other, tmp_path, monkeypatch, best=2e-4) == []
    names = {path.name for path in (tmp_path / "x").glob("*.json")}
    assert {path.name for path in (tmp_path / "y").glob("*.json")} == names
    for name in names:
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("y", "x"))
        assert ours == {**theirs, "chosen_by": "score"}
    # Their tables are two: what was chosen otherwise is not compared.
    assert sorted(group.title for group in final_results(tmp_path)) == [
        "BBC news, 8 examples, one epoch", "BBC news, 8 examples, one epoch, rates by score",
    ]  # fmt: skip


def test_another_choice_has_its_own_final_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = one(tmp_path, lrs=[1e-4, 2e-4, 4e-4], max_extensions=1)
    run(first, tmp_path, monkeypatch, best=2e-4)
    for lr in first.contenders[0].lrs:
        path = tmp_path / "x" / f"a--tuning--lr{lr:g}--seed100.json"
        result = json.loads(path.read_text())
        result["metrics"]["validation"]["accuracy"] = 0.5 + 100.0 * lr  # the highest rate has the best score
        path.write_text(json.dumps(result))
    begun = run(by_score(tmp_path), tmp_path, monkeypatch, best=2e-4)
    assert begun == ["a--tuning--lr0.0008--seed100", "a--final--lr0.0004--seed0"]
    assert {path.name for path in (tmp_path / "y").glob("*--final--*")} == {"a--final--lr0.0004--seed0.json"}
    assert {path.name for path in (tmp_path / "x").glob("*--final--*")} == {"a--final--lr0.0002--seed0.json"}


def test_runs_of_an_earlier_revision_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = one(tmp_path, lrs=[1e-4])
    run(first, tmp_path, monkeypatch)
    path = tmp_path / "x" / "a--final--lr0.0001--seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": 0}))
    assert run(by_score(tmp_path), tmp_path, monkeypatch) == ["a--final--lr0.0001--seed0"]


def test_runs_of_other_data_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "bench_task", in_place_of_bench_task([]))
    first = one(tmp_path, lrs=[1e-4])
    run(first, tmp_path, monkeypatch)
    path = tmp_path / "x" / "a--final--lr0.0001--seed0.json"
    data = {"train": {"sha256": "0" * 64, "examples": 8}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": data}))
    (outcome,) = run_experiments([by_score(tmp_path)], tmp_path)
    assert "nothing of 'y' is run" in outcome.failure
    assert str(path) in outcome.failure
