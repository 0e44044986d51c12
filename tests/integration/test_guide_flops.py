"""What the ledger says was spent is what ran, counted operation by operation."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from rgft import Config, Guide, prober
from rgft.errors import BudgetError, ConfigError
from rgft.progress import Progress
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, collate, guided, trimmed

HEADS = {"bert", "gpt2", "llama", "qwen3", "t5", "mixtral", "vit", "resnet", "efficientnet"}
TEXT = {"text", "lm"}


def audited(name: str, settings: dict[str, Any], *, steps: int, epochs: float = 1) -> tuple[Guide, float]:
    """Runs under the counter; returns the guide and the FLOPs counted in the loop alone."""
    family = FAMILIES[name]
    guide = Guide(family.build(), Config(**settings))
    optimizer = adamw(guide)
    data = Examples(family, count=24)
    collator = trimmed if family.kind in TEXT else collate
    batches = guide.batches(data, batch_size=4, collate_fn=collator, epochs=epochs)
    counted = 0.0
    for _ in range(steps):
        batch = next(batches)  # traces costs the first time: no part of the run
        counted += count_flops(lambda batch=batch: guide.loss(batch).backward())
        guide.step(optimizer)
        optimizer.zero_grad()
    guide.detach()
    return guide, counted


@pytest.mark.parametrize("name", FAMILIES)
def test_ledger_equals_the_count(name: str) -> None:
    """Two steps with everything on and a probe, a cut, misses in the first epoch, hits in the second."""
    granularity = {"granularity": "head", "ffn_blocks": 3} if name in HEADS else {}
    settings = {
        **granularity, "probe": {"interval": 4, "size": 2}, "warmup_fraction": 0.1, "mask": {"frozen_fraction": 0.5},
        "stability": {"preserve_mean": True, "always_on": ()},
    }  # fmt: skip
    guide, counted = audited(name, settings, steps=10, epochs=2)
    assert guide.plan.cut > 0
    assert guide.ledger.probes >= 2
    if name not in {"t5"}:
        assert guide.cache is not None
        assert min(guide.cache.hits, guide.cache.misses) > 0
        assert guide.ledger.forward_cached_flops > 0
    assert guide.ledger.spent_flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama", "t5", "mixtral", "vit", "resnet", "efficientnet", "peft_llama_lora"]
)
def test_ledger_equals_the_count_with_scattered_heads_on(name: str) -> None:
    settings: dict[str, Any] = {
        "granularity": "adapter" if "peft" in name else "head", "probe": {"interval": 2, "size": 2},
        "warmup_fraction": 0.0, "mask": {"name": "random", "q": 0.3},
    }  # fmt: skip
    if "peft" not in name:
        settings["ffn_blocks"] = 3
    guide, counted = audited(name, settings, steps=5)
    assert 0 < len(guide.active) < len(guide.partition)
    assert guide.ledger.spent_flops == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_ledger_knows_whether_a_step_was_made_with_dropout(name: str) -> None:
    """Without it attention runs in a fused kernel, whose backward pass makes a product anew."""
    counted: dict[str, float] = {}
    for setting in ("model", "off"):
        guide, counted[setting] = audited(name, {"preset": "full", "update": {"dropout": setting}}, steps=2)
        assert guide.ledger.spent_flops == pytest.approx(counted[setting], rel=1e-6)
        # What full fine-tuning would cost is not a matter of what this run leaves out.
        assert guide.ledger.reference_flops == pytest.approx(counted["model"], rel=1e-6)
        again = counted[setting] - counted["model"]
        assert guide.ledger.recomputed_flops == pytest.approx(again, rel=1e-6)
        assert guide.ledger.dx_truncated_flops == 0.0
    assert counted["off"] > 1.001 * counted["model"]


def test_a_run_that_changes_its_mind_about_dropout_is_counted_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(preset="full", update={"dropout": "auto"}))  # type: ignore[arg-type]
    monkeypatch.setattr(Progress, "sees_none_again", lambda progress, plan: progress.step % 2 == 1)
    optimizer, spent, counted = adamw(guide), [0.0], []
    for batch in guide.batches(Examples(family, count=16), batch_size=4, collate_fn=collate):
        counted.append(count_flops(lambda batch=batch: guide.loss(batch).backward()))
        guide.step(optimizer)
        optimizer.zero_grad()
        spent.append(guide.ledger.spent_flops)
    assert [after - before for before, after in pairwise(spent)] == pytest.approx(counted, rel=1e-6)
    assert counted[0] == counted[2] < counted[1] == counted[3]


@pytest.mark.parametrize(
    "signal", ["residual_dot", "generalising_decrease", "grad_norm", "predicted_decrease", "suppression", "act_x_grad",
               "fisher", "taylor", "weight_magnitude", "random"],
)  # fmt: skip
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_probes_of_every_kind_are_counted(signal: str, granularity: str) -> None:
    settings: dict[str, Any] = {"signal": signal, "scaling": "rank", "probe": {"interval": 1000, "size": 2},
                                "mask": {"name": "target_sparsity"}, "warmup_fraction": 0.0, "granularity": granularity,
                                "stability": {"preserve_mean": False}}  # fmt: skip
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(**settings))
    optimizer = adamw(guide)
    guide.set_optimizer(optimizer)
    next(guide.batches(Examples(family), batch_size=4, collate_fn=collate, epochs=1000))
    assert guide._prober.pool is not None
    counted = count_flops(guide.begin_step)
    assert guide.ledger.probes == 1
    assert guide.ledger.probe_flops == pytest.approx(counted, rel=0.02, abs=1.0)


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("name", "budget", "accumulation"),
    [("bert", 0.2, 1), ("bert", 0.2, 2), ("bert", 0.6, 1), ("llama", 0.3, 2), ("resnet", 0.3, 1)],
)
def test_a_run_spends_its_budget_and_not_more(name: str, budget: float, accumulation: int) -> None:
    family = FAMILIES[name]
    collator = trimmed if family.kind in TEXT else collate
    guide = Guide(family.build(), Config(budget=budget))
    guided(
        guide, adamw(guide), Examples(family, count=100), epochs=4, collate_fn=collator, accumulation=accumulation,
        batch_size=4,
    )  # fmt: skip
    spent = guide.summary()["flops"]["fraction_of_full"]
    assert spent <= budget
    assert spent > 0.9 * budget or guide.progress == 1.0  # a deep cut may leave something after the last epoch
    assert spent > 0.9 * budget or budget > 0.5
    assert guide.flops_fraction == spent
    assert guide.ledger.probe_flops <= 0.02 * guide.ledger.spent_flops * 1.1
    assert guide.plan.cut > 0 or guide.plan.reason


def test_scoring_stays_within_its_share() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(budget=0.3, probe={"max_fraction": 0.2}))
    guided(guide, adamw(guide), Examples(family, count=240), epochs=4, collate_fn=trimmed)
    assert guide.ledger.probes > 1
    assert guide.run_plan is not None
    assert 0.0 < guide.ledger.probe_flops <= 0.2 * guide.run_plan.flops


def test_without_a_budget_the_epochs_end_the_run() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(preset="full"))
    batches, _ = guided(guide, adamw(guide), Examples(family), epochs=1.5)
    assert len(batches) == 9
    assert guide.summary()["flops"]["fraction_of_full"] == pytest.approx(1.0)


def test_too_small_a_budget_says_the_minimum_and_that_minimum_runs() -> None:
    family = FAMILIES["bert"]
    data = Examples(family)

    def run(budget: float) -> Guide:
        guide = Guide(family.build(), Config(budget=budget))
        guided(guide, adamw(guide), data)
        return guide

    with pytest.raises(BudgetError, match="less than one step of the cheapest plan") as caught:
        run(1e-4)
    minimum = float(str(caught.value).rpartition(" ")[2])
    guide = run(minimum)
    assert guide.step_count >= 1
    assert guide.flops_fraction <= minimum
    with pytest.raises(BudgetError):
        run(minimum * 0.97)
    full_step = guide.costs.full_step(*guide._spending.typical).total if guide.costs else 0.0
    assert minimum * (guide.run_plan.full_flops if guide.run_plan else 0.0) < 0.7 * full_step  # that of a deep cut


def test_the_torch_encoder_in_eval_mode_with_gradients() -> None:
    """Its inference path nests tensors, which its layers with gradients refuse: a model of torch's own fails there."""
    family = FAMILIES["torch_transformer_encoder"]
    model = family.build()
    with Guide(
        model, Config(mask={"frozen_fraction": 0.5}, warmup_fraction=0.0, probe={"interval": 2, "size": 2})
    ) as guide:
        guided(guide, adamw(guide), Examples(family), steps=3)
        assert guide.plan.cut == 2
        model.eval()
        batch = family.batch()
        with_gradients = model(**batch).logits
        with torch.no_grad():
            without = model(**batch).logits
        assert torch.allclose(with_gradients, without, atol=1e-6)


def test_scoring_of_training_gradients_is_no_time_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    family, pause, calls = FAMILIES["bert"], 0.02, 0
    guide = Guide(family.build(), Config(budget=0.9, warmup_fraction=0.9, probe={"interval": 0}))
    assert guide._measurement is not None
    own = guide._measurement.observe_training

    def slow(step: int) -> None:
        nonlocal calls
        calls += 1
        time.sleep(pause)
        own(step)

    monkeypatch.setattr(guide._measurement, "observe_training", slow)
    started = time.perf_counter()
    guided(guide, adamw(guide), Examples(family, 40), epochs=1)
    elapsed = time.perf_counter() - started
    assert calls >= 3
    assert guide.ledger.seconds["probe"] >= calls * pause
    assert guide.ledger.seconds["step"] <= elapsed - calls * pause


@pytest.mark.parametrize(("most", "stride"), [(32, 1), (3, 3)])
def test_a_long_measuring_phase_scores_some_of_its_steps(
    most: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "MAX_SCORED_STEPS", most)
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(budget=0.9, warmup_fraction=0.9, probe={"interval": 0}))
    scored: list[int] = []
    assert guide._measurement is not None
    monkeypatch.setattr(guide._measurement, "observe_own_step", scored.append)
    guided(guide, adamw(guide), Examples(family, 48), epochs=1)
    assert guide.step_count >= 9
    assert len(scored) >= 3
    assert scored == [stride * (position + 1) - 1 for position in range(len(scored))]


def test_accumulation_does_not_thin_out_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "MAX_SCORED_STEPS", 4)
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(budget=0.9, warmup_fraction=0.9, probe={"interval": 0}))
    guide.accumulation = 4
    scored: list[int] = []
    assert guide._measurement is not None
    monkeypatch.setattr(guide._measurement, "observe_own_step", scored.append)
    guided(guide, adamw(guide), Examples(family, 96), batch_size=2, epochs=1, accumulation=4)
    assert guide.step_count >= 8
    assert 3 <= len(scored) <= 9
    assert scored[-1] > guide.step_count / 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "peft_llama_lora"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_weight_gradients_from_a_sample_of_positions_are_counted(name: str, granularity: str) -> None:
    if "peft" in name and granularity == "head":
        granularity = "adapter"
    settings: dict[str, Any] = {
        "granularity": granularity, "mask": {"frozen_fraction": 0.5},
        "probe": {"interval": 4, "size": 2}, "warmup_fraction": 0.1,
    }  # fmt: skip
    (plain, _), (guide, counted) = (
        audited(name, {**settings, "update": {"sample": share, "low_rank": None}}, steps=10, epochs=2)
        for share in (1.0, 0.25)
    )
    assert guide.ledger.spent_flops == pytest.approx(counted, rel=0.02)
    assert guide.ledger.reference_flops == plain.ledger.reference_flops
    made, all_of_them = guide.ledger.dw_flops, plain.ledger.dw_flops
    assert 0.2 * all_of_them < made < 0.75 * all_of_them
    # What was not made of it stands beside what was not made of components that are off.
    rows = guide.ledger.as_rows()
    assert sum(flops for _, flops, _ in rows[:-1]) == pytest.approx(rows[-1][1])


def test_a_compiled_model_is_refused_where_gradients_are_sampled() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    model.compile(backend="eager")
    guide = Guide(model, Config(update={"sample": 0.5}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"update.sample: expected a model that is not compiled"):
        next(guide.batches(Examples(family), batch_size=4, collate_fn=collate))


def test_losses_of_a_step_are_exact_where_its_gradients_are_sampled() -> None:
    family = FAMILIES["bert"]
    losses = []
    for share in (1.0, 0.25):
        guide = Guide(family.build(), Config(preset="full", update={"sample": share, "dropout": "off"}))
        losses.append(guided(guide, adamw(guide), Examples(family), steps=3, collate_fn=collate)[1])
        guide.detach()
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
