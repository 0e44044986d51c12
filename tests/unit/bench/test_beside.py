from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench.figures import figure, in_words, is_lower_better, is_of, names
from rgft.bench.finals import final_results
from rgft.bench.table import markdown
from rgft.bench.verdict import verdicts
from rgft.cli.app import app
from rgft.errors import DataError
from tests.unit.bench.test_table import write


def measured(drift: float, imdb: float | None = None, *, updated: float = 2e6) -> dict[str, Any]:
    domain = {"examples": 5, "left_out": 0, "metrics": {} if imdb is None else {"accuracy": imdb}, "undefined": {}}
    return {
        "measures": {
            "general": {"corpus": "docstrings", "similarity_drift": drift, "probe": {"forgetting": -drift}},
            "weights": {"overall": {"cosine": 0.99, "relative_change": drift / 10}},
            "other_domains": {"imdb": domain},
        },
        "ledger": {
            "flops": {"fraction_of_full": 0.3}, "parameters": {"updated_per_step": updated, "updated_in_all": 4e6}
        },
    }  # fmt: skip


def test_figures_lie_where_runs_put_them() -> None:
    result = {"metrics": {"test": {"loss": 0.5}, "validation": {"loss": 0.4}}, **measured(0.2, 0.7)}
    assert {name: figure(result, name) for name in names(result)} == {
        "loss": 0.5, "imdb:accuracy": 0.7, "probe_forgetting": -0.2, "similarity_drift": 0.2, "weight_change": 0.02,
        "updated_per_step": 2e6, "updated_in_all": 4e6, "cosine": 0.99, "flops": 0.3,
    }  # fmt: skip
    assert figure(result, "sst2:accuracy") is None
    assert (is_of(result, "imdb:accuracy"), is_of(result, "sst2:accuracy"), is_of(result, "f1")) == (True, False, True)
    assert not is_of({"metrics": {}, "measures": {}}, "similarity_drift")
    assert [in_words(name) for name in ("imdb:accuracy", "calibration_error")] == [
        "imdb:accuracy",
        "test calibration error",
    ]
    assert [is_lower_better(name) for name in ("imdb:loss", "imdb:accuracy", "forgetting")] == [True, False, True]


def test_runs_that_were_not_asked_are_missing_and_not_undefined(tmp_path: Path) -> None:
    for seed in range(5):
        write(tmp_path, "rgft", seed, 0.4, **(measured(0.1 + seed / 100) if seed < 3 else {}))
        write(tmp_path, "lora", seed, 0.5, **measured(0.3 + 1.1 * seed / 100))
    (verdict,) = verdicts(tmp_path, "rgft", "lora", metric="similarity_drift")
    (comparison,) = verdict.by_task.values()
    assert (comparison.seeds, comparison.verdict) == (3, "better")
    assert comparison.difference == pytest.approx(0.201)
    ((rows,),) = (final_results(tmp_path).values(),)
    assert rows[0].lacks("imdb:accuracy") == "not measured"


def test_what_is_measured_on_different_texts_is_not_compared(tmp_path: Path) -> None:
    def on(texts: str | None, drift: float) -> dict[str, Any]:
        found = measured(drift, 0.7 + drift)
        if texts is not None:
            data = {"examples": 9, "sha256": texts}
            found["measures"]["general"]["data"] = {"texts": {**data, "python": "3.11"}, "probe": data}
            found["measures"]["other_domains"]["imdb"]["data"] = data
        return found

    for seed in range(3):
        noise = seed / 100
        write(tmp_path, "rgft", seed, 0.4, **on(f"a{seed}", 0.1 + noise))
        write(tmp_path, "full", seed, 0.5, **on(f"a{seed}", 0.3 + 1.1 * noise))
        write(tmp_path, "lisa", seed, 0.5, **on(None, 0.3 + 1.1 * noise))
        write(tmp_path, "lora", seed, 0.5, **on("b" if seed == 1 else f"a{seed}", 0.3 + 1.1 * noise))
    for metric in ("similarity_drift", "probe_forgetting", "imdb:accuracy"):
        for label in ("full", "lisa"):
            assert verdicts(tmp_path, "rgft", label, metric=metric)
        with pytest.raises(DataError, match=f"{metric} of rgft and lora with seed 1 is on different texts; run one"):
            verdicts(tmp_path, "rgft", "lora", metric=metric)
    # What has nothing to do with them is compared as ever.
    for metric in ("loss", "weight_change"):
        assert verdicts(tmp_path, "rgft", "lora", metric=metric)
    rows = {row.split("|")[1].strip(): row for row in markdown(tmp_path).split("Beside quality, at")[1].splitlines()[2:]
            if row.startswith("|")}  # fmt: skip
    assert rows["lora (3 seeds)"].count("(other texts)") == 3
    assert "(other texts)" not in rows["full (3 seeds)"] + rows["lisa (3 seeds)"] + rows["rgft (3 seeds)"]


def test_a_figure_that_some_runs_could_not_give_is_undefined(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4, **measured(0.1, 0.7 if seed else None))
    ((rows,),) = (final_results(tmp_path).values(),)
    assert rows[0].lacks("imdb:accuracy") == "undefined (1 of 3 seeds)"


def test_what_stands_beside_quality_has_a_table_of_its_own(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4, **measured(0.1 + seed / 100, 0.75))
        write(tmp_path, "lora", seed, 0.5, **measured(0.3 + 1.1 * seed / 100, 0.65 - seed / 100, updated=1.5e5))
        write(tmp_path, "full", seed, 0.5)
    _, table, _ = markdown(tmp_path).split("\n\nBeside quality, ")[1].split("\n\n")
    heading, _, ours, theirs = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert heading == [
        "", "parameters a step, millions", "another task's probe lower by", "drift of similarities",
        "change of weights", "accuracy on imdb",
    ]  # fmt: skip
    assert ours == ["rgft (3 seeds)", "2.000", "-0.110", "0.110", "0.011", "0.750"]
    assert theirs == ["lora (3 seeds)", "0.150", "-0.311†°", "0.311\\*°", "0.031\\*", "0.640\\*°"]


def test_without_any_there_is_no_such_table(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4)
    assert "Beside quality, at" not in markdown(tmp_path)


def test_a_figure_that_no_run_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "rgft", seed, 0.4, **measured(0.1))
        write(tmp_path, "lora", seed, 0.4, **measured(0.1))
    given = ["bench", "compare", "rgft", "lora", str(tmp_path), "--metric", "forgetting"]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 2
    assert "similarity_drift" in found.output
