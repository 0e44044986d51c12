import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench import agenda, sitting
from rgft.bench.finals import final_results
from rgft.bench.fingerprint import DataCheck
from rgft.bench.results import Results
from rgft.bench.runner import identity_of
from rgft.errors import ConfigError, DataError
from rgft.tasks.fingerprint import data_of, fingerprint
from tests.unit.bench.test_experiment import loaded

ROWS = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4], "labels": 1}]


class Prepared:
    """As much of a task as a fingerprint asks for."""

    def __init__(self, train: list[Any], test: list[Any] | None = None) -> None:
        self.train, self.validation, self.test, self.judged_on = train, None, test, None


@pytest.mark.parametrize(
    "other",
    [
        ROWS[::-1],
        ROWS[:1],
        [{**ROWS[0], "labels": 1}, ROWS[1]],
        [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}],
        [{"input_ids": [1, 23], "labels": 0}, ROWS[1]],
        [{"input_ids": ["1", 2, 3], "labels": 0}, ROWS[1]],
        [{"input_ids": [1, 2, 3], "labels": 0.0}, ROWS[1]],
        [{"input_ids": torch.tensor([1, 2, 3]), "labels": 0}, ROWS[1]],
    ],
)
def test_any_change_shows(other: list[Any]) -> None:
    assert fingerprint(other) != fingerprint(ROWS)
    assert fingerprint([dict(reversed(list(row.items()))) for row in ROWS]) == fingerprint(ROWS)


def test_stored_fingerprints_stay_as_they_are() -> None:
    text = "mapping 2;str 11;'input_ids'list 3;int 1;1int 2;23int 2;-4str 8;'labels'bool 4;True"
    assert fingerprint([{"input_ids": [1, 23, -4], "labels": True}]) == sha256(text.encode()).hexdigest()


def test_tensors_by_value_and_type() -> None:
    one = torch.arange(6.0).view(2, 3)
    assert fingerprint([one]) == fingerprint([one.clone()]) == fingerprint([one.t().contiguous().t()])
    assert len({fingerprint([x]) for x in (one, one.t(), one.double(), one + 1, one.bool(), one.bfloat16())}) == 6
    with pytest.raises(DataError, match="expected examples of numbers, texts, lists and tensors, found object"):
        fingerprint([object()])


def test_a_data_set_may_speak_for_itself() -> None:
    class Own(list[Any]):
        fingerprint = "mine"

    assert data_of(Prepared(Own([1]))) == {"train": {"examples": 1, "sha256": "mine"}}  # type: ignore[arg-type]


def test_a_result_on_other_data_is_refused() -> None:
    asked: list[int] = []

    def prepare(seed: int) -> Any:
        asked.append(seed)
        return Prepared(ROWS, [seed])

    check = DataCheck(prepare)
    good = {"seed": 3, "data": data_of(Prepared(ROWS, [3]))}  # type: ignore[arg-type]
    check.require_same(good, "here")
    check.require_same(good, "here")
    check.require_same({"seed": 9}, "old")
    assert (asked, check.unknown) == ([3], 1)
    with pytest.raises(DataError, match=r"there: measured on other data than the data of now \(test: 1 examples"):
        check.require_same({**good, "data": data_of(Prepared(ROWS, [4]))}, "there")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="test: none there"):
        check.require_same({**good, "data": data_of(Prepared(ROWS))}, "there")  # type: ignore[arg-type]


def test_an_experiment_s_stored_results_are_checked_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = loaded(tmp_path)
    results = Results(tmp_path / "results" / experiment.name)
    monkeypatch.setattr(agenda, "bench_task", lambda settings, *, seed, allow_code_execution: Prepared(ROWS, [seed]))
    monkeypatch.setattr(sitting, "run_cell", lambda *_, **__: pytest.fail("nothing may be run"))
    cell = list(experiment.all_cells())[-1]
    good = {**identity_of(experiment, cell), "metrics": {"validation": {"loss": 1.0}}}
    results.write(cell, {**good, "data": data_of(Prepared(ROWS, [2]))})  # type: ignore[arg-type]
    (outcome,) = sitting.run_experiments([experiment], tmp_path / "results")
    assert "b--final--lr0.0001--seed1.json: measured on other data" in outcome.failure
    assert outcome.failure.startswith("nothing of 'x' is run")
    for key, value in (
        ("run", {"epochs": 9}), ("common_config", {"granularity": "head"}), ("budget", 0.5), ("settings", {"rank": 2}),
        ("method", "lora"), ("contender", "c"), ("lr", 2e-4), ("is_final", False),
    ):  # fmt: skip
        results.write(cell, {**good, key: value})
        with pytest.raises(DataError, match=f"expected a result with the experiment's '{key}'"):
            list(sitting.run_experiments([experiment], tmp_path / "results"))
    results.write(cell, {**good, "revision": good["revision"] + 1})
    with pytest.raises(DataError, match=r"expected a result of revision \d of 'full', found one of revision \d"):
        list(sitting.run_experiments([experiment], tmp_path / "results"))
    for text in ('{"seed": 1, "da', "{}", "[]", "null"):
        results.path(cell).write_text(text)
        with pytest.raises(DataError, match=r"b--final--lr0.0001--seed1.json: .* found a damaged file"):
            list(sitting.run_experiments([experiment], tmp_path / "results"))
        with pytest.raises(DataError, match=r"b--final--lr0.0001--seed1.json: .* found a damaged file"):
            final_results(tmp_path)
    results.write(cell, {**good, "metrics": {}})
    with pytest.raises(DataError, match=r"b--final--lr0.0001--seed1.json: .*without ledger, steps"):
        final_results(tmp_path)


def test_data_are_checked_where_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = loaded(tmp_path)
    cells, results, prepared = list(experiment.all_cells()), Results(tmp_path / experiment.name), list[int]()

    def stored(rows: list[Any]) -> None:
        for cell in cells:
            result = {**identity_of(experiment, cell), "metrics": {"validation": {"loss": 1.0 - cell.lr}}}
            results.write(cell, {**result, "data": data_of(Prepared(rows))})  # type: ignore[arg-type]

    def bench_task(settings: Any, *, seed: int, allow_code_execution: bool) -> Any:
        prepared.append(seed)
        return Prepared(ROWS)

    def missing(*_: Any, **__: Any) -> Any:
        raise ConfigError("no such package")

    monkeypatch.setattr(agenda, "bench_task", bench_task)
    monkeypatch.setattr(
        sitting, "run_cell", lambda experiment, cell, _: identity_of(experiment, cell) | {"metrics": {}}
    )
    stored(ROWS)
    list(sitting.run_experiments([experiment], tmp_path))
    prepared.clear()
    assert list(sitting.run_experiments([experiment], tmp_path)) == []
    assert sorted(prepared) == sorted({cell.seed for cell in cells})
    stored(ROWS[:1])
    (outcome,) = sitting.run_experiments([experiment], tmp_path)
    assert "measured on other data than the data of now" in outcome.failure
    # Without the data there is nothing to compare with, which is no failure where nothing is to be run.
    monkeypatch.setattr(agenda, "bench_task", missing)
    assert list(sitting.run_experiments([experiment], tmp_path)) == []
    results.path(cells[0]).unlink()
    (outcome,) = sitting.run_experiments([experiment], tmp_path)
    assert "no such package" in outcome.failure


def test_a_half_written_result_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, results = loaded(tmp_path), Results(tmp_path / "results")
    cell = next(experiment.all_cells())
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(Exception, match="killed"):
        results.write(cell, {"x": 1})
    assert results.read(cell) is None
    assert list((tmp_path / "results").iterdir()) == []


def test_runs_on_different_data_are_not_compared(tmp_path: Path) -> None:
    shared = {"task": {"name": "bbc", "train_size": 8}, "run": {"epochs": 1.0}, "method": "full", "budget": 0.3,
              "seed": 0, "lr": 1e-4, "metrics": {"test": {"loss": 1.0}}, "ledger": {}, "steps": 1}  # fmt: skip
    for name, rows in (("a", ROWS), ("b", ROWS[:1])):
        one = {**shared, "contender": name, "data": data_of(Prepared(rows))}  # type: ignore[arg-type]
        (tmp_path / f"{name}--final--lr1--seed0.json").write_text(json.dumps(one))
    with pytest.raises(DataError, match=r"b--final.*a--final.*beside which it would stand"):
        final_results(tmp_path)
