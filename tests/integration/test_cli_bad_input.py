"""Bad input on the command line: what is said, the exit code, and what is left on disk."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rgft.cli.app import app
from rgft.run import Run, StepReport
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, save_inputs, text, write_rows
from tests.unit.telemetry.faults import fill_disk_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder, rows=80)
    return folder


@pytest.fixture
def options(folder: Path) -> list[str]:
    return [
        "train",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "data.csv"),
        "--batch-size",
        "8",
        "--quiet",
    ]


GOOD = [(text(i), i % 2) for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one row, found none"),
        ([(text(i), "only") for i in range(20)], "expected at least two classes"),
        ([*GOOD, ("", 1)], "row 41: expected a text in column 'text'"),
        ([*GOOD, ("good", "")], "row 41: expected a label"),
    ],
)
def test_rows_that_cannot_be_trained_on(
    options: list[str], tmp_path: Path, rows: list[tuple[str, Any]], message: str
) -> None:
    data = write_rows(tmp_path / "bad.csv", rows)
    assert message in refused(*options, "--data", data, "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labels_unseen_in_training(options: list[str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "validation.csv", [("good a", "good"), ("bad a", "ugly")])
    message = refused(*options, "--validation", data, "--output", str(tmp_path / "run"))
    assert "row 2: the label 'ugly' does not occur in the training data" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "missing.csv"], "missing.csv: expected a file, found nothing there"),
        (["--model", "./missing"], "./missing: expected a folder with a saved model"),
        (["--text", "sentence"], "there is no column 'sentence'"),
        (["--task", "regression"], "expected a number as label, found 'good'"),
        (["--budget", "0.01%"], "the smallest budget of this run is"),
        (["--budget", "0.0001"], "the smallest budget of this run is"),
        (["--set", "device=tpu"], "device: expected auto, cpu or a device of this machine, found 'tpu'"),
        (["--set", "mask.frozen_fraction=2"], "mask.frozen_fraction: expected 0 <= frozen_fraction <= 1, found 2"),
        (["--granularity", "adapter"], "adapter"),
        (["--config", "missing.yaml"], "missing.yaml: expected a YAML file"),
    ],
)
def test_what_is_refused_leaves_nothing(options: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    assert message in refused(*options, *more, "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_budget_is_a_share_or_a_percentage(options: list[str], tmp_path: Path) -> None:
    found = [
        json.loads(invoke(*options, "--budget", share, "--dry-run", "--json", "--output", str(tmp_path / "run")).stdout)
        for share in ("0.3", "30%", "30 %")
    ]
    assert found[0]["budget"] == pytest.approx(0.3)
    assert found[0] == found[1] == found[2]
    message = CliRunner().invoke(app, [*options, "--budget", "a third", "--output", str(tmp_path / "run")]).stderr
    assert "such as 0.3 or 30%, found 'a third'" in " ".join(message.replace("│", "").split())


def test_a_refused_overwrite_keeps_the_old_run(options: list[str], tmp_path: Path) -> None:
    arguments = [*options, "--epochs", "1", "--output", str(tmp_path / "run")]
    invoke(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused(*arguments, "--overwrite", "--budget", "0.0001")
    refused(*arguments, "--overwrite", "--label", "lable")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_folders_that_hold_no_run_are_left_alone(options: list[str], tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    refused(*options, *flags, "--output", str(tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    assert "found a file" in refused(*options, *flags, "--output", str(tmp_path / "thesis" / "chapter.tex"))
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Run], object]) -> None:
    """Has `act` called right after a step of the next run."""
    original = Run.prepare

    def prepare(self: Run) -> Any:
        def observe(report: StepReport) -> None:
            if report.step == step:
                act(self)

        if self.guide.run_plan is None:  # the first of several calls
            self.observers.append(observe)
        return original(self)

    monkeypatch.setattr(Run, "prepare", prepare)


def spoil(run: Run) -> None:
    with torch.no_grad():
        next(iter(run.task.model.classifier.parameters())).fill_(float("nan"))  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_stops_the_run(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    at_step(monkeypatch, 5, spoil)
    message = refused(*options, "--output", str(output), "--checkpoint-every", "3", "--budget", "0.8", code=1)
    assert "step 5: the gradient of" in message
    assert "(loss nan)" in message
    assert not (output / "model").exists()
    folder = RunFolder.open(output)
    state = folder.load_checkpoint()
    assert state["guide"]["step_count"] == 3
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    records = folder.read_records()
    assert [record.step for record in records if record.type == "step"] == [1, 2, 3, 4, 5]
    assert records[-1].type == "end"
    assert records[-1].data["status"] == "failed"
    assert "not finite" in records[-1].data["message"]


def test_a_failed_run_goes_on_from_its_last_good_checkpoint(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*options, "--checkpoint-every", "3", "--budget", "0.5"]
    with monkeypatch.context() as patch:
        at_step(patch, 5, spoil)
        refused(*arguments, "--output", str(tmp_path / "run"), code=1)
    invoke(*arguments, "--output", str(tmp_path / "run"), "--resume")
    invoke(*arguments, "--output", str(tmp_path / "whole"))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


@pytest.fixture
def unfinished(folder: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs of its own, and in `run` a run on them that failed after a checkpoint."""
    shutil.copytree(folder / "model", tmp_path / "model")
    write_rows(tmp_path / "data.csv", GOOD)
    write_rows(tmp_path / "validation.csv", GOOD[:10])
    arguments = [*options, "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.csv")]
    arguments += ["--validation", str(tmp_path / "validation.csv"), "--budget", "0.9", "--checkpoint-every", "3"]
    with monkeypatch.context() as patch:
        at_step(patch, 5, spoil)
        refused(*arguments, "--output", str(tmp_path / "run"), code=1)
    return tmp_path


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda at: write_rows(at / "data.csv", GOOD[::-1]), "what differs: training data (40 examples "),
    (lambda at: write_rows(at / "data.csv", [(t, 1 - y) for t, y in GOOD]), "what differs: training data (40 "),
    (lambda at: write_rows(at / "data.csv", GOOD[:20]), "training data (40 examples "),
    (lambda at: write_rows(at / "validation.csv", GOOD[1:11]), "what differs: validation data (10 examples "),
    (lambda at: other_names(at), "what differs: classes (0, 1 then, a, b now)"),
    (lambda at: other_tokenizer(at / "model"), "tokenizer"),
]


def other_names(folder: Path) -> None:
    named = [(words, "ab"[label]) for words, label in GOOD]
    write_rows(folder / "data.csv", named)
    write_rows(folder / "validation.csv", named[:10])


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["j"], words["[MASK]"] = words["[MASK]"], words["j"]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_run_goes_on_with_the_inputs_that_it_was_started_with(
    unfinished: Path, change: Callable[[Path], object], message: str
) -> None:
    change(unfinished)
    before = {path: path.read_bytes() for path in (unfinished / "run").rglob("*") if path.is_file()}
    found = refused("train", "--resume", "--output", str(unfinished / "run"), "--quiet")
    assert message in found
    assert "bring them back, or start anew in another folder" in found
    assert {path: path.read_bytes() for path in (unfinished / "run").rglob("*") if path.is_file()} == before


def test_a_run_from_before_inputs_were_kept_goes_on(unfinished: Path) -> None:
    file = unfinished / "run" / "config.json"
    config = json.loads(file.read_text())
    del config["inputs"]
    file.write_text(json.dumps(config))
    invoke("train", "--resume", "--output", str(unfinished / "run"), "--quiet")
    assert list(RunFolder.open(unfinished / "run").read_records())[-1].type == "end"


def test_a_disk_that_fills_up_during_the_run(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda run: fill_disk_after(patch, 100))
        message = refused(*options, "--output", str(output), "--checkpoint-every", "3", code=1)
    assert "the disk is full" in message
    folder = RunFolder.open(output)
    assert [record.step for record in folder.read_records() if record.type == "step"] == [1, 2, 3, 4]
    assert folder.load_checkpoint()["guide"]["step_count"] == 3
    assert not list(output.rglob(".*"))
    invoke(*options, "--output", str(output), "--checkpoint-every", "3", "--resume")
    assert (output / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_disk_that_fills_up_while_the_model_is_saved(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from transformers import BertForSequenceClassification

    def save_pretrained(self: Any, path: Path) -> None:
        (path / "config.json").write_text("half")
        raise error

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(BertForSequenceClassification, "save_pretrained", save_pretrained)
        assert "the disk is full" in refused(*options, "--output", str(output), code=1)
    assert not (output / "model").exists()
    assert not list(output.glob(".*"))
    before = (output / "error_map.json").read_text()
    invoke(*options, "--output", str(output), "--resume")
    assert (output / "model" / "model.safetensors").exists()
    assert (output / "error_map.json").read_text() == before


def test_an_interruption_during_evaluation_costs_the_evaluation_only(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Run, dataset: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", interrupted)
        assert "--resume" in refused(*options, "--output", str(output), code=130, said="interrupted")
    steps = [record.step for record in RunFolder.open(output).read_records() if record.type == "step"]
    invoke(*options, "--output", str(output), "--resume")
    assert [record.step for record in RunFolder.open(output).read_records() if record.type == "step"] == steps


def test_ctrl_c_before_training_leaves_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "prepare", interrupted)
    assert CliRunner().invoke(app, [*options, "--output", str(tmp_path / "run")]).exit_code == 130
    assert not (tmp_path / "run").exists()


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom rgft.cli.app import app\n"
        "result = CliRunner().invoke(app, ['train', '--help'])\nassert '--budget' in result.stdout\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
