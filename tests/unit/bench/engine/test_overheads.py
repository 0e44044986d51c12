import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.engine.overheads import runner, switching
from rgft.bench.engine.overheads.figures import Measured, Target
from rgft.bench.engine.overheads.guide_time import BoundLoop, GuidedLoop
from rgft.bench.engine.overheads.memory import Shape, shape_of, theory
from rgft.bench.engine.overheads.sizes import SMALL, USUAL
from rgft.bench.engine.overheads.switching import KnownMoments, plan_switch
from rgft.errors import DataError
from rgft.execution.executor import Executor
from rgft.partition import partition

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("overheads")
    assert list(runner.run_overheads(SMALL, folder, device=CPU, stop_after_seconds=0.0)) == []
    paths = list(runner.run_overheads(SMALL, folder, device=CPU))
    assert list(runner.run_overheads(SMALL, folder, device=CPU)) == []
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    table = runner.table(folder)
    assert table.count("| cpu |") == sum(len(result["targets"]) for result in found.values())
    return found


def test_every_result_says_how_it_was_made(results: dict[str, dict[str, Any]]) -> None:
    assert sorted(results) == sorted(runner.measurements(SMALL, CPU))
    for name, result in results.items():
        assert (result["schema"], result["overhead"], result["sizes"]) == (runner.SCHEMA, name, "small")
        assert result["measured_on"] == "cpu"
        assert {"model"} < result["config"].keys()
        assert {"cpu", "memory", "packages"} < result["environment"].keys()
        assert result["warm_up"] >= 0 < result["repeats"]
        assert result["targets"]
        for target in result["targets"]:
            assert target["figure"] in result["figures"]


def test_figures_are_positive(results: dict[str, dict[str, Any]]) -> None:
    for name in ("plan_switch-layer", "plan_switch-head"):
        figures = results[name]["figures"]
        assert figures["apply_seconds"] > 0 < figures["guide_seconds"]
        assert len(figures["apply_seconds_each"]) == len(figures["guide_seconds_each"]) == SMALL.switches
        assert figures["moments_are_intact"] is True
    assert results["plan_switch-head"]["figures"]["components"] > results["plan_switch-layer"]["figures"]["components"]
    guide = results["guide_time"]["figures"]
    assert min(guide[f"{part}_seconds"] for part in ("own", "affords", "loss", "step", "norms")) > 0
    assert guide["own_seconds"] < guide["guided_step_seconds"]
    assert any("step.py" in row["function"] for row in guide["profile"])
    full = results["full_preset"]["figures"]
    assert full["time_of_plain"] > 0 < full["median_of_ratios"]
    for result in results.values():
        if result["overhead"].startswith("memory"):
            measured = result["figures"]["measured"]
            assert min(measured.values()) > 0
            # Not the total: activations are gone when the last gradients come.
            assert result["figures"]["peak_bytes"] >= measured["total"] - measured["activations"]


def test_measured_memory_is_what_theory_says(results: dict[str, dict[str, Any]]) -> None:
    memories = [r for r in results.values() if r["overhead"].startswith("memory")]
    assert [round(r["config"]["frozen_fraction"], 2) for r in memories] == [0.25, 0.5, 0.75, 0.5]
    for result in memories:
        figures, config = result["figures"], result["config"]
        assert figures["ratios"]["weights"] == figures["ratios"]["gradients"] == 1.0
        assert figures["ratios"]["moments"] == pytest.approx(1.0, rel=0.05)  # torch's counters of steps, 4 bytes each
        assert 0.85 < figures["trained_of_theory"] < 1.15
        item = {"bfloat16": 2, "float32": 4}[config["dtype"]]
        assert figures["measured"]["gradients"] == item * config["trained_parameters"]
        assert figures["fp32_moments_add_bytes"] == 2 * (4 - item) * config["trained_parameters"]


def test_theory_by_hand() -> None:
    shape = Shape(
        parameters=1000, buffers_bytes=12, trained=300, item_bytes=2, layers=4, active_layers=1, layer_activations=80,
        other_activations=7,
    )  # fmt: skip
    found = theory(shape)
    assert (found.weights, found.gradients, found.moments, found.activations) == (2012, 600, 1200, 27)


def test_the_shape_of_a_small_model_by_hand() -> None:
    """Hidden 32, inner 64, 4 heads of 8 in 2 groups, 64 words: counted from LLaMA's definition."""
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32
    shape = shape_of(SMALL.large, CPU, 0.5)
    assert shape.parameters == 4 * layer + 2 * 64 * 32 + 32
    assert shape.trained == 2 * layer + 64 * 32 + 32
    assert (shape.layers, shape.active_layers, shape.item_bytes) == (4, 2, 2)
    # A layer keeps at least its input, what both norms make of it, and three tensors of the inner size: 8 tokens, bf16.
    assert shape.layer_activations >= 4 * 8 * (3 * 32 + 3 * 64) * 2
    # The logits, whose softmax the loss keeps, in fp32: 8 tokens × 64 words.
    assert shape.other_activations >= 8 * 64 * 4


def test_the_large_model_has_about_a_billion_parameters_and_the_other_300_components() -> None:
    with torch.device("meta"):
        large, many = USUAL.large.build(), USUAL.many_components.build()
    assert 0.9e9 < sum(p.numel() for p in large.parameters()) < 1.2e9
    assert {p.dtype for p in large.parameters()} == {torch.bfloat16}
    assert 280 <= len(partition(many, "head", ffn_blocks=USUAL.many_components.neuron_blocks)) <= 320
    assert torch.get_default_dtype() == torch.float32


def test_a_changed_or_missing_moment_is_noticed() -> None:
    parameter = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moments = KnownMoments(optimizer)
    assert moments.are_intact()
    changed = optimizer.state[parameter]["exp_avg_sq"]
    kept = changed.clone()
    changed.view(torch.int16)[4, 2] ^= 1  # the lowest bit of one element
    assert not moments.are_intact()
    changed.copy_(kept)
    assert moments.are_intact()
    del optimizer.state[parameter]
    assert not moments.are_intact()


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_switch_that_touches_moments_is_reported(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_other_mode(*args: Any, moments: str, **more: Any) -> Executor:
        return Executor(*args, moments="decay", **more)

    monkeypatch.setattr(switching, "Executor", with_other_mode)
    measured = plan_switch(SMALL, CPU, granularity)
    assert not measured.figures["moments_are_intact"]
    assert {t["figure"]: t["is_met"] for t in measured.to_dict()["targets"]}["moments_are_intact"] is False


def test_plans_move_the_cut_and_are_never_seen_twice() -> None:
    parts = partition(SMALL.large.build(), "head", ffn_blocks=2)
    plans = switching._plans(parts, 6)
    assert [plan.cut for plan in plans] == [3, 2] * 3
    assert len({plan.active() for plan in plans}) == 6
    assert all(parts[name].depth >= plan.cut for plan in plans for name in plan.active())


def test_the_guides_own_time_leaves_out_passes_and_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something slow in the optimizer's step changes nothing, something slow in the guide's does."""
    loop = GuidedLoop(SMALL.many_components, CPU)
    slow = _sleeping(0.05)
    inner = loop.optimizer.register_step_pre_hook(slow)
    for _ in range(3):
        loop.step()
    assert loop.own_seconds()["step"] < 0.05
    inner.remove()
    monkeypatch.setattr(loop.guide, "end_step", lambda whole=loop.guide.end_step: (slow(), whole()))
    loop.watch.seconds.clear()
    loop.step()
    assert loop.own_seconds()["step"] >= 0.05
    loop.guide.detach()


def _sleeping(seconds: float) -> Callable[..., None]:
    return lambda *args: time.sleep(seconds)


def test_both_loops_train_the_same_parameters() -> None:
    guided, bound = GuidedLoop(SMALL.many_components, CPU), BoundLoop(SMALL.many_components, CPU)
    held = [p for group in guided.optimizer.param_groups for p in group["params"]]
    assert sorted(tuple(p.shape) for p in held) == sorted(tuple(p.shape) for p in bound.parameters)
    before = [p.detach().clone() for p in bound.parameters]
    bound.step()
    assert any(not torch.equal(old, p) for old, p in zip(before, bound.parameters, strict=True))
    guided.guide.detach()


def test_targets_say_whether_they_are_met() -> None:
    figures = {"ratio": 1.1}
    assert Target(figure="ratio", at_most=1.1, at_least=0.9).is_met(figures)
    assert not Target(figure="ratio", at_most=1.0).is_met(figures)
    assert not Target(figure="ratio", at_least=1.2).is_met(figures)
    measured = Measured(config={}, figures=figures, targets=(Target(figure="ratio", at_most=1),), warm_up=0, repeats=1)
    assert [target["is_met"] for target in measured.to_dict()["targets"]] == [False]


def test_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected results of the overhead bench"):
        runner.table(tmp_path)
