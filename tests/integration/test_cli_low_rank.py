"""Low-rank pairs from the command line: a run, a stopped and resumed one, a search, a memory budget, a forecast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, save_inputs

OPTIONS = (
    "--budget", "0.5", "--epochs", "12", "--lr", "3e-3", "--json", "--quiet", "--low-rank", "2",
    "--set", "update.low_rank.lr_multiplier=1", "--set", "mask.readout=0.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["train", *save_inputs(tmp_path_factory.mktemp("inputs"))]


def trained(inputs: list[str], folder: Path, *more: str) -> dict[str, Any]:
    return json.loads(invoke(*inputs, "--output", str(folder), *OPTIONS, *more).stdout)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_learns_counts_what_it_does_and_leaves_a_plain_model(inputs: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    report = trained(inputs, tmp_path / "run")
    assert 0.4 < report["flops"]["fraction_of_full"] <= 0.5
    assert report["metrics"]["validation"]["accuracy"] > 0.9
    assert report["audit"]["audits"] >= 2
    assert abs(report["audit"]["error"]) < 0.02
    assert report["flops"]["low_rank_pairs"] > 0.0
    assert report["flops"]["probes"] > 0.0
    plans = RunFolder.open(tmp_path / "run").read_plans()
    assert len(plans[0].data["low_rank"]) == 3
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert not [name for name in loaded.state_dict() if "low_rank" in name]
    before = load_file(Path(inputs[2]) / "model.safetensors")
    moved = {n for n, w in weights(tmp_path / "run").items() if n in before and not torch.equal(w, before[n])}
    assert any("attention.self.query.weight" in name for name in moved)
    fewer = [sum(p.numel() for n, p in before.items() if "layer.0" in n), report["parameters"]["updated_in_last_step"]]
    assert fewer[1] < fewer[0]


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    inputs: list[str], tmp_path: Path, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--granularity", granularity, "--checkpoint-every", "5")
    whole = trained(inputs, tmp_path / "whole", *more)
    from rgft.run import Run

    step = Run._step

    def stopping(self: Run, *args: Any) -> None:
        step(self, *args)
        if self.guide.step_count == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_step", stopping)
    message = refused(*inputs, "--output", str(tmp_path / "cut"), *OPTIONS, *more, code=130, said="interrupted")
    assert "--resume" in message
    monkeypatch.undo()
    resumed = json.loads(invoke("train", "--output", str(tmp_path / "cut"), "--resume", "--json", "--quiet").stdout)
    assert resumed["steps"] == whole["steps"]
    assert resumed["flops"]["spent"] == whole["flops"]["spent"]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_learning_rate_is_searched_among_pairs(inputs: list[str], tmp_path: Path) -> None:
    # one that learns on any machine, and one that diverges at once
    options = ("--budget", "0.9", "--epochs", "12", "--lr", "3e-3,3.0", "--json", "--quiet", "--low-rank", "2",
               "--set", "mask.readout=0.0")  # fmt: skip
    report = json.loads(invoke(*inputs, "--output", str(tmp_path / "run"), *options).stdout)
    assert report["lr"] == 3e-3
    assert report["flops"]["search"] > 0.0
    assert report["metrics"]["validation"]["accuracy"] > 0.9


def test_a_memory_budget_counts_pairs(inputs: list[str], tmp_path: Path) -> None:
    """Gradients, moments and means of pairs alone, so that what pairs need is less than what dense dW would."""
    averaging = ("--set", "update.average_last=0.3")
    plain = json.loads(
        invoke(*inputs, "--output", str(tmp_path / "x"), "--dry-run", "--json", "--memory", "1GB", *averaging).stdout
    )
    paired = json.loads(
        invoke(
            *inputs, "--output", str(tmp_path / "x"), "--dry-run", "--json", "--memory", "1GB", "--low-rank", "1",
            "--set", "update.low_rank.others=frozen", *averaging,
        ).stdout
    )  # fmt: skip
    parts, fewer = plain["run_plan"]["memory"]["parts"], paired["run_plan"]["memory"]["parts"]
    for what in ("gradients", "moments", "averages"):
        assert fewer[what] < 0.5 * parts[what]
    assert fewer["weights"] > parts["weights"]
    report = trained(inputs, tmp_path / "run", "--memory", "1GB")
    assert report["memory"]["is_within"]
    assert report["memory"]["measured_bytes"] < report["memory"]["forecast_bytes"]
    assert paired["low_rank"]["rank"] == 1
    assert len(paired["low_rank"]["components"]) == 3
    shown = invoke(*inputs, "--output", str(tmp_path / "x"), "--dry-run", "--low-rank", "1").stdout
    assert "low-rank pairs of rank 1 (alpha 16) in place of dense dW: 3 of" in shown


def test_what_a_model_would_cost(tmp_path: Path) -> None:
    inputs = save_inputs(tmp_path, rows=4)
    options = ["--model", inputs[1], "--tokens", "16", "--examples", "100", "--epochs", "4", "--low-rank", "2"]
    found = json.loads(invoke("plan", *options, "--memory", "1GB", "--json").stdout)
    ways = {(way["rank"], round(way["frozen_fraction"], 2)): way for way in found["ways"] if way["name"] == "rgft"}
    assert set(ways) == {(rank, share) for rank in (0, 2) for share in (0.0, 0.33, 0.67)}
    for share in (0.0, 0.33, 0.67):
        dense, pairs = ways[0, share], ways[2, share]
        assert pairs["trained_parameters"] < dense["trained_parameters"]
        assert pairs["flops"] < dense["flops"]
        assert pairs["memory"]["gradients"] < dense["memory"]["gradients"]
        assert pairs["needed"] < dense["needed"]
    assert "pairs of 2" in invoke("plan", *options, "--device", "none").stdout


def test_a_rank_is_at_least_one(inputs: list[str], tmp_path: Path) -> None:
    message = refused(*inputs, "--output", str(tmp_path / "x"), "--set", "update.low_rank.rank=0")
    assert "update.low_rank.rank" in message
    message = refused(*inputs, "--output", str(tmp_path / "x"), "--low-rank", "2", "--set", "update.low_rank.rnak=3")
    assert "update.low_rank.rnak" in message
