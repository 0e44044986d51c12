"""`rgft train` as a user runs it: on a CSV, with a saved model, in a process of its own where signals matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, save_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["train", *save_inputs(tmp_path_factory.mktemp("inputs"))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_reaches_the_budget_and_leaves_everything_behind(inputs: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

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
    assert all(torch.equal(value, weights(tmp_path / "run")[name]) for name, value in loaded.state_dict().items())
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_ended_resumes_bit_for_bit(inputs: list[str], tmp_path: Path, number: signal.Signals) -> None:
    options = ("--quiet", "--checkpoint-every", "7")
    whole = start(inputs, tmp_path / "whole", *options)
    process = start(inputs, tmp_path / "run", *options)
    wait_for_step(tmp_path / "run", process, 20)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), errors.decode()
    assert not (tmp_path / "run" / "model").exists()
    resumed = start(inputs, tmp_path / "run", *options, "--resume")
    assert resumed.wait(timeout=240) == 0
    assert whole.wait(timeout=240) == 0
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())
    folders = [RunFolder.open(tmp_path / name) for name in ("whole", "run")]
    assert folders[0].read_json("error_map.json") == folders[1].read_json("error_map.json")
    losses = [[record.data["loss"] for record in f.read_records() if record.type == "step"] for f in folders]
    assert losses[0] == losses[1]
    plans = [[record.data for record in f.read_plans()] for f in folders]
    assert len(plans[0]) > 0
    assert plans[0] == plans[1]


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
