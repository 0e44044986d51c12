"""Memory budgets on the command line: given, shown, recorded, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rgft.cli.request import read_request
from rgft.plan import MemoryPlan
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import invoke, refused, save_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["train", *save_inputs(tmp_path_factory.mktemp("inputs"))]


def test_memory_stands_beside_what_is_spent(tmp_path: Path) -> None:
    given = {"model": "m", "data": "d.csv"}
    file = tmp_path / "run.yaml"
    file.write_text("rgft: {budget: 0.5}")
    alone = read_request(flags=given, overrides=["budget.memory=8GB"])
    assert alone.config.to_dict()["budget"] == {"flops": 0.3, "memory": 8 * 10**9}
    assert read_request(flags=given, file=file, overrides=["budget.memory=8GB"]).config.budget.flops == 0.5  # type: ignore[union-attr]
    full = read_request(flags=given, rgft_flags={"preset": "full"}, overrides=["budget.memory=8GB"])
    assert full.config.to_dict()["budget"] == {"memory": 8 * 10**9}


def test_a_dry_run_shows_what_is_chosen(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--output", str(tmp_path / "run"), "--dry-run"]
    plain = json.loads(invoke(*options, "--json").stdout)
    assert plain["run_plan"]["memory"] is None
    by_flag = json.loads(invoke(*options, "--json", "--memory", "300KB").stdout)
    by_setting = json.loads(invoke(*options, "--json", "--set", "budget.memory=300000").stdout)
    assert by_flag == by_setting
    plan = MemoryPlan.from_dict(by_flag["run_plan"]["memory"])
    assert plan.limit == 300_000
    assert 0.7 * plan.limit < plan.needed <= plan.limit
    assert plan.lowest_cut >= 2
    assert by_flag["first_plan"]["cut"] >= plan.lowest_cut
    assert by_flag["run_plan"]["flops"] == plain["run_plan"]["flops"]
    shown = invoke(*options, "--memory", "300KB").stdout
    assert "of 300 KB for a step on the largest batch, 8 × 6" in shown
    assert all(f"  {choice}\n" in shown for choice in plan.choices)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_to_it_and_says_so(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--output", str(tmp_path / "run"), "--memory", "400KB", "--epochs", "6"]
    shown = invoke(*options)
    measured = re.search(r"memory of a step: measured (\d+) KB, forecast (\d+) KB, limit 400 KB\n", shown.stdout)
    assert measured
    assert 100 < int(measured[1]) <= int(measured[2]) <= 400
    folder = RunFolder.open(tmp_path / "run")
    ledger = folder.read_json("ledger.json")["memory"]
    assert ledger["limit_bytes"] == 400_000
    assert ledger["is_within"] is True
    assert ledger["measured_bytes"] <= ledger["forecast_bytes"] <= 400_000
    assert ledger["resident_growth_bytes"] >= 0
    recorded = folder.read_json("memory.json")
    assert recorded.pop("schema") == "rgft.memory/1"
    plan = MemoryPlan.from_dict(recorded)
    assert plan.needed == ledger["forecast_bytes"]
    assert all(record.data["cut"] >= plan.lowest_cut for record in folder.read_plans())


def test_what_is_refused(inputs: list[str], tmp_path: Path) -> None:
    options = [*inputs, "--output", str(tmp_path / "run")]
    for wrong in ("8G", "-3GB", "0", "much"):
        text = refused(*options, "--memory", wrong)
        assert "rgft.budget.memory: expected a number of bytes > 0, or one with a unit" in text
    text = " ".join(refused(*options, "--memory", "50KB").split())
    assert "holds no plan of this run, whose weights alone take 102 KB" in text
    least = int(re.search(r"the least that one needs is \d+ KB \((\d+) bytes\)", text)[1])  # type: ignore[index]
    assert "checkpointing that train only the classifier. Shorter inputs" in text
    assert not (tmp_path / "run").exists()
    assert json.loads(invoke(*options, "--dry-run", "--json", "--memory", str(least)).stdout)["run_plan"]["memory"]
    refused(*options, "--dry-run", "--memory", str(int(0.99 * least)))


def test_ways_of_training_under_a_limit(inputs: list[str]) -> None:
    model = inputs[inputs.index("--model") + 1]
    options = ["plan", "--model", model, "--tokens", "16", "--batch-size", "8", "--examples", "100", "--device", "none"]
    assert json.loads(invoke(*options, "--json").stdout)["under_limit"] is None
    found = json.loads(invoke(*options, "--memory", "800KB", "--json").stdout)
    fits = {(way["name"], round(way["frozen_fraction"], 2)): way["fits"] for way in found["ways"]}
    assert fits == {("rgft", 0.0): False, ("lora", 0.0): False, ("rgft", 0.33): False, ("rgft", 0.67): True}
    for way in found["ways"]:
        # Temporaries and a margin beside.
        assert way["memory"]["total"] < way["needed"] < 1.6 * way["memory"]["total"]
        assert way["fits"] == (way["needed"] <= 800_000)
    plan = MemoryPlan.from_dict(found["under_limit"]["plan"])
    assert plan.rows_per_pass < 8
    assert plan.lowest_cut == 0
    shown = invoke(*options, "--memory", "800KB").stdout
    assert "RGFT 67%: 599 KB, fits" in shown
    assert "passes of at most" in shown
    small = json.loads(invoke(*options, "--memory", "1KB", "--json").stdout)["under_limit"]
    assert small["plan"] is None
    assert "the least that one needs is" in small["problem"]
    assert "memory: expected a number of bytes" in refused(*options, "--memory", "8G")
