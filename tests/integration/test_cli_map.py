"""`rgft map`, `rgft env` and what a dry run predicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft import Config
from rgft.cli.mapping import BAR_WIDTH, bar, measure
from rgft.cli.preparing import device_of, prepare_task, run_settings
from rgft.cli.preview import preview
from rgft.cli.request import Request, read_request
from rgft.errors import ConfigError
from rgft.run import Run
from rgft.tasks.base import PreparedTask
from tests.integration.cli_inputs import invoke, refused, save_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder, rows=80)
    return folder


def request_for(folder: Path, *overrides: str) -> Request:
    flags = {"model": str(folder / "model"), "data": str(folder / "data.csv"), "batch_size": 8}
    return read_request(flags=flags, overrides=overrides)


@pytest.fixture
def task(folder: Path) -> PreparedTask:
    return prepare_task(request_for(folder).settings)


@pytest.fixture
def options(folder: Path) -> list[str]:
    return ["map", "--model", str(folder / "model"), "--data", str(folder / "data.csv"), "--probe-size", "8"]


def test_scores_of_the_whole_data_are_the_gradients_norms(task: PreparedTask) -> None:
    config = Config(signal={"name": "grad_norm", "normalise": "raw"}, scaling=None)
    size = len(task.train)
    measured = measure(task, config, probes=1, probe_size=size, lr=1e-3)
    task.model.eval()
    batch = task.collate([task.train[i] for i in range(size)])
    task.loss(task.model, batch).mean().backward()
    for row in measured.rows:
        own = [p.grad for name, p in task.model.named_parameters() if name.startswith(f"{row.component}.")]
        direct = torch.stack([g.square().sum() for g in own if g is not None]).sum().sqrt()
        assert row.score == pytest.approx(float(direct), rel=1e-4), row.component
    assert sum(row.share or 0.0 for row in measured.rows) == pytest.approx(1.0)


def test_the_step_judged_is_a_fresh_adamws(task: PreparedTask) -> None:
    """AdamW's first step is −lr · g / (|g| + ε), g of one half; the other half's gradient says what it gains."""
    model, collate, batches = copy.deepcopy(task.model).eval(), task.collate, []

    def recorded(examples: list[Any]) -> dict[str, torch.Tensor]:
        batches.append(collate(examples))
        return batches[-1]

    task.collate = recorded
    measured = measure(task, Config(), probes=1, probe_size=20, lr=1e-3)
    own, judge = (gradients(task, model, batch) for batch in batches)
    for row in measured.rows:
        names = [name for name in own if name.startswith(f"{row.component}.")]
        gain = sum(float((judge[n].double() * 1e-3 * own[n] / (own[n].abs() + 1e-8)).sum()) for n in names)
        assert row.score == pytest.approx(gain, rel=1e-3, abs=1e-9), row.component


def gradients(task: PreparedTask, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    task.loss(model, batch).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_measuring_moves_nothing(task: PreparedTask) -> None:
    before = copy.deepcopy(task.model.state_dict())
    names = [name for name, _ in task.model.named_parameters()]
    task.model.train()
    measure(task, Config(granularity="head"), probes=2, probe_size=8, lr=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert [name for name, _ in task.model.named_parameters()] == names
    assert all(p.grad is None for p in task.model.parameters())
    assert task.model.training


def test_the_same_seed_gives_the_same_map(task: PreparedTask) -> None:
    maps = [measure(task, Config(seed=seed), probes=2, probe_size=8, lr=1e-3) for seed in (1, 1, 2)]
    assert maps[0] == maps[1]
    assert maps[0].history != maps[2].history


def test_json_and_picture(options: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "map.png"
    data = json.loads(invoke(*options, "--probes", "3", "--json", "--png", str(picture)).stdout)
    assert data["signal"] == "generalising_decrease"
    assert [probe["probe"] for probe in data["history"]] == [1, 2, 3]
    for component in data["components"]:
        scores = [probe["scores"][component["component"]] for probe in data["history"]]
        mean = sum(scores) / 3
        assert component["score"] == pytest.approx(mean)
        assert component["standard_error"] == pytest.approx((sum((s - mean) ** 2 for s in scores) / 6) ** 0.5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["map.png"]


def test_the_table_has_a_row_and_a_bar_per_component(options: list[str]) -> None:
    lines = invoke(*options, "--probes", "2", "--signal", "grad_norm").stdout.splitlines()
    rows = [line for line in lines if "layer." in line]
    assert len(rows) == 3
    assert any("█" * BAR_WIDTH in line for line in lines)


@pytest.mark.parametrize(
    ("score", "text"), [(2.0, "█" * BAR_WIDTH), (1.0, "█" * (BAR_WIDTH // 2)), (-2.0, "░" * BAR_WIDTH), (0.0, "")]
)
def test_bars(score: float, text: str) -> None:
    assert bar(score, 2.0) == text


def test_bad_input(options: list[str]) -> None:
    assert "did you mean 'grad_norm'" in refused(*options, "--signal", "grad_nrm")
    assert "expected something to measure, found none (preset 'full')" in refused(*options, "--preset", "full")
    refused(*options, "--label", "lable")


@pytest.fixture
def run(folder: Path, task: PreparedTask) -> Iterator[Run]:
    request = request_for(folder, "rgft.budget=0.5", "execution.positions=all", "mask.readout=0.0")
    run = Run(task, request.config, run_settings(request.settings))
    run.prepare()
    yield run
    run.close()


def test_a_preview_adds_up(run: Run) -> None:
    data, costs = preview(run), run.guide.costs
    assert costs is not None
    rows, tokens = data["typical_batch"]["rows"], data["typical_batch"]["tokens"]
    parts = sum(row[f"{axis}_flops"] for row in data["by_depth"] for axis in ("forward", "dx", "dw"))
    assert parts == pytest.approx(costs.full_step(rows, tokens).total)
    assert [row["depth"] for row in data["by_depth"]] == [0, 1, 2, 3, 4]
    fractions = [row["step_fraction"] for row in data["by_depth"]]
    assert 1.0 <= fractions[0] < 1.02  # without dropout, which full fine-tuning has, attention makes a product anew
    assert fractions == sorted(fractions, reverse=True)
    assert all(row["cached_step_fraction"] <= row["step_fraction"] for row in data["by_depth"])
    assert sum(row["parameters"] for row in data["by_depth"]) == data["model"]["parameters"]
    assert data["budget"] == pytest.approx(0.5)
    assert data["steps_in_full"] == 27  # 72 training rows, 9 batches of 8, 3 epochs


def test_a_preview_counts_the_step_in_which_the_data_end(folder: Path, task: PreparedTask) -> None:
    request = request_for(folder, "accumulation=2", "rgft.preset=full")
    run = Run(task, request.config, run_settings(request.settings))
    plan = run.prepare()
    assert preview(run)["steps_in_full"] == plan.steps == 14  # 27 batches
    run.close()


@pytest.mark.parametrize("frozen", [0.5, 0.75])
def test_a_preview_says_how_many_steps_are_made(folder: Path, task: PreparedTask, frozen: float) -> None:
    """A cut by hand; what lies below it is cached, so that later epochs are cheaper than the first."""
    request = request_for(
        folder, "rgft.budget=0.3", "epochs=12", "execution.cache=memory", "mask.name=budget",
        f"mask.frozen_fraction={frozen}",
    )  # fmt: skip
    run = Run(task, request.config, run_settings(request.settings))
    run.prepare()
    data = preview(run)
    run.train()
    cut = run.guide.plan.cut
    assert cut > 0
    (said,) = (row["steps"] for row in data["by_depth"] if row["depth"] == cut)
    assert said == pytest.approx(run.guide.step_count, rel=0.1)
    (rate,) = data["learning_rates"]
    assert rate == pytest.approx(run.lr, rel=0.2)
    run.close()


def test_what_a_run_spends_is_within_what_was_predicted(run: Run) -> None:
    data = preview(run)
    run.train()
    spent = run.guide.summary()["flops"]["spent"]
    assert 0.9 * data["run_plan"]["flops"] < spent <= data["run_plan"]["flops"]
    assert run.guide.summary()["flops"]["full"] == data["run_plan"]["full_flops"]


def test_the_environment_as_lines_and_as_json() -> None:
    data = json.loads(invoke("env", "--json").stdout)
    lines = invoke("env").stdout.splitlines()
    assert f"python: {data['python']}" in lines
    assert f"  torch: {data['packages']['torch']}" in lines


def test_devices() -> None:
    assert device_of("cpu") == "cpu"
    with pytest.raises(ConfigError, match="found 'abacus'"):
        device_of("abacus")
