"""`rgft train` as a user runs it: on a CSV, with a saved model, in a process of its own where signals matter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rgft.cli.preparing import prepare_task
from rgft.cli.request import RunSettings
from rgft.tasks.base import PreparedTask
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, save_inputs, used_as_the_card_says


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["train", *save_inputs(tmp_path_factory.mktemp("inputs"))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_reaches_the_budget_and_leaves_everything_behind(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tasks: list[PreparedTask] = []

    def prepared(settings: RunSettings) -> PreparedTask:
        tasks.append(prepare_task(settings))
        return tasks[-1]

    monkeypatch.setattr("rgft.cli.train.prepare_task", prepared)
    more = ("--budget", "0.5", "--epochs", "12", "--lr", "3e-3", "--json", "--quiet")
    result = invoke(*inputs, "--output", str(tmp_path / "run"), *more)
    report = json.loads(result.stdout)
    assert 0.4 < report["flops"]["fraction_of_full"] <= 0.5
    assert report["metrics"]["validation"]["accuracy"] > 0.9
    folder = RunFolder.open(tmp_path / "run")
    steps = [record for record in folder.read_records() if record.type == "step"]
    assert len(steps) == report["steps"]
    assert folder.read_json("ledger.json")["flops"] == report["flops"]
    assert report["audit"]["audits"] >= 2
    assert abs(report["audit"]["error"]) < 0.02
    assert folder.read_plans()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    trained = tasks[0].model.state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("good a b")["input_ids"] == tasks[0].processor("good a b")["input_ids"]
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert used_as_the_card_says(tmp_path / "run" / "model")[0]["label"] in {"bad", "good"}
    names = {
        "config.json",
        "environment.json",
        "records.jsonl",
        "plans.jsonl",
        "error_map.json",
        "ledger.json",
        "model",
    }
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    assert loaded.config.id2label == {0: "bad", 1: "good"}


def test_dry_run_shows_the_cost_and_writes_nothing(inputs: list[str], tmp_path: Path) -> None:
    result = invoke(*inputs, "--output", str(tmp_path / "run"), "--dry-run", "--json", "--quiet")
    plan = json.loads(result.stdout)
    assert plan["run_plan"]["flops"] == pytest.approx(0.3 * plan["run_plan"]["full_flops"])
    assert [c["depth"] for c in plan["components"]] == [0, 1, 2, 3, 4, 4]
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(inputs: list[str], tmp_path: Path) -> None:
    arguments = (*inputs, "--output", str(tmp_path / "run"), "--epochs", "1", "--quiet")
    invoke(*arguments)
    before = weights(tmp_path / "run")
    assert "--resume" in refused(*arguments)
    message = refused(*arguments, "--resume", "--lr", "5e-3", "--set", "probe.size=4")
    assert "lr: the run was started with 0.001, found 0.005" in message
    assert "rgft.probe: the run was started with" in message
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())
    invoke(*arguments, "--overwrite", "--seed", "3")
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


def test_all_wrong_settings_at_once_and_nothing_written(inputs: list[str], tmp_path: Path) -> None:
    text = refused(*inputs, "--output", str(tmp_path / "run"), "--lr", "-1", "--set", "prob.size=3", "--budget", "2")
    assert all(part in text for part in ("lr: expected", "did you mean 'probe'", "budget.flops"))
    assert "did you mean 'label'" in refused(*inputs, "--output", str(tmp_path / "run"), "--label", "lable")
    assert not (tmp_path / "run").exists()


def start(inputs: list[str], output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rgft.cli", *inputs, "--output", str(output), "--epochs", "8", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(output: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = output / "records.jsonl"
        if records.exists() and records.read_bytes().count(b'"step"') >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"the run did not get to step {step}: {process.communicate()[1].decode()[-500:]}")


OPTIONS = ("--quiet", "--checkpoint-every", "7")


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nobody ends."""
    output = tmp_path_factory.mktemp("whole") / "run"
    process = start(inputs, output, *OPTIONS)
    assert process.wait(timeout=120) == 0
    return RunFolder.open(output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_that_was_ended_resumes_bit_for_bit(
    inputs: list[str], whole: RunFolder, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "run"
    process = start(inputs, output, *OPTIONS)
    wait_for_step(output, process, 16)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors.decode()
    assert not (output / "model").exists()
    if code > 0:
        assert f"go on with: rgft train --resume --output {output}" in errors.decode()
        end = RunFolder.open(output).read_records()[-1]
        assert (end.type, end.data["status"]) == ("end", "interrupted")
    # Nothing but the folder is needed to go on.
    invoke("train", "--resume", "--output", str(output), "--quiet")
    assert all(torch.equal(value, weights(whole.path)[name]) for name, value in weights(output).items())
    folder = RunFolder.open(output)
    assert folder.read_json("error_map.json") == whole.read_json("error_map.json")
    losses = [[record.data["loss"] for record in f.read_records() if record.type == "step"] for f in (whole, folder)]
    assert losses[0] == losses[1]
    plans = [[record.data for record in f.read_plans()] for f in (whole, folder)]
    assert len(plans[0]) > 0
    assert plans[0] == plans[1]


def test_a_run_that_is_finished_is_not_run_again(inputs: list[str], tmp_path: Path) -> None:
    arguments = (*inputs, "--output", str(tmp_path / "run"), "--epochs", "1", "--json", "--quiet")
    first = json.loads(invoke(*arguments).stdout)
    assert not (tmp_path / "run" / "checkpoint").exists()
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    again = json.loads(invoke("train", "--resume", "--output", str(tmp_path / "run"), "--json").stdout)
    assert (again["metrics"], again["flops"]) == (first["metrics"], first["flops"])
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = json.loads(invoke("train", "--resume", "--output", str(moved), "--json").stdout)
    assert (again["output"], again["model"]) == (str(moved), str(moved / "model"))


def test_a_file_asks_for_the_same_run_as_flags(inputs: list[str], tmp_path: Path) -> None:
    flags = dict(zip(inputs[1::2], inputs[2::2], strict=True))
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {flags['--model']}\ndata: {flags['--data']}\nbatch_size: 8\nlr: 1e-3\nepochs: 9\n"
        "rgft: {budget: 0.4, probe: {size: 6}}"
    )
    invoke("train", "--config", str(file), "--epochs", "1", "--output", str(tmp_path / "file"), "--quiet")
    invoke(*inputs, "--epochs", "1", "--budget", "0.4", "--set", "probe.size=6", "--output", str(tmp_path / "flags"))
    folders = [RunFolder.open(tmp_path / name) for name in ("file", "flags")]
    assert folders[0].read_json("config.json") == folders[1].read_json("config.json")
    assert weights(folders[0].path).keys() == weights(folders[1].path).keys()
    assert all(torch.equal(v, weights(folders[1].path)[name]) for name, v in weights(folders[0].path).items())


def test_regression_and_pairs_of_texts(inputs: list[str], tmp_path: Path) -> None:
    data = tmp_path / "pairs.tsv"
    rows = [f"good {'abcdefghij'[i % 10]}\tbad {'abcdefghij'[i % 7]}\t{i % 10 / 10}" for i in range(80)]
    data.write_text("\n".join(["first\tsecond\tscore", *rows]))
    report = json.loads(
        invoke(
            *inputs, "--data", str(data), "--task", "regression", "--text", "first", "--text", "second", "--label",
            "score", "--test", str(data), "--output", str(tmp_path / "run"), "--json", "--quiet",
        ).stdout
    )  # fmt: skip
    assert report["primary_metric"] == "mse"
    assert report["metrics"].keys() == {"validation", "test"}
    assert 0.0 < report["metrics"]["test"]["mse"] < 1.0
    evaluations = [r for r in RunFolder.open(tmp_path / "run").read_records() if r.type == "evaluation"]
    assert {r.data["split"]: r.data["metrics"] for r in evaluations} == report["metrics"]
    assert used_as_the_card_says(tmp_path / "run" / "model").keys() == {"label", "score"}


def test_what_is_said_goes_to_standard_error_and_tables_to_standard_output(inputs: list[str], tmp_path: Path) -> None:
    result = invoke(*inputs, "--output", str(tmp_path / "a"), "--epochs", "1")
    assert "step 1 · loss" in result.stderr
    assert "accuracy" in result.stdout
    assert "spent" in result.stdout
    result = invoke(*inputs, "--output", str(tmp_path / "b"), "--epochs", "1", "--json")
    assert "step 1 · loss" in result.stderr
    assert json.loads(result.stdout)["status"] == "finished"
    result = invoke(*inputs, "--output", str(tmp_path / "c"), "--epochs", "1", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")
    result = invoke(*inputs, "--output", str(tmp_path / "d"), "--dry-run")
    assert "first plan, before anything is scored" in result.stdout
    assert not (tmp_path / "d").exists()


def test_errors_of_a_process_are_one_message(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rgft.cli",
        "train",
        "--model",
        "x",
        "--data",
        str(tmp_path / "no.csv"),
        "--output",
    ]
    result = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: ")
    assert "Traceback" not in result.stderr


def test_a_dry_run_without_probes_says_so(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--output", str(tmp_path / "x"), "--dry-run"]
    assert "%), no probes; cache: " in invoke(*options, "--preset", "full").stdout
    probing = ["--set", "probe.interval=2", "--epochs", "8"]
    assert re.search(r"%\), (probes included: [1-9]\d* of \d+ examples|no probes); ", invoke(*options, *probing).stdout)


def test_a_first_step_beyond_the_budget_is_remarked_upon(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rgft.guide.machine_pace", lambda model: 1e18)  # a guess that is far too high
    result = invoke(*inputs, "--output", str(tmp_path / "run"), "--joules", "1e-6", "--seconds", "1000")
    (line,) = [line for line in result.stderr.splitlines() if "of a budget of" in line]
    assert line.startswith("WARNING: ")
    assert "were spent of a budget of 1e-06 J: what a step takes is known once one was made" in line
    enough = invoke(*inputs, "--output", str(tmp_path / "enough"), "--joules", "1e6", "--epochs", "1")
    assert "of a budget of" not in enough.stderr


def test_a_budget_of_seconds(inputs: list[str], tmp_path: Path) -> None:
    """Of 500 epochs two seconds buy a few; how close the run comes is tested with a clock of its own."""
    result = invoke(
        *inputs, "--output", str(tmp_path / "run"), "--seconds", "2", "--epochs", "500", "--json", "--quiet"
    )
    report = json.loads(result.stdout)
    assert report["flops"]["fraction_of_full"] < 0.5
    assert 1.0 < report["seconds"]["total"] < 4.0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["resolved"]["budget"] == {"seconds": 2.0}
