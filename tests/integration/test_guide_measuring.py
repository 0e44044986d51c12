"""Whether a run measures before it decides: only where what it would see could decide anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rgft import Config, Guide
from rgft.allocation.base import Situation
from rgft.allocation.compose import Composed
from rgft.error_map import ENOUGH
from rgft.plan import UpdatePlan
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, collate, guided

BERT = FAMILIES["bert"]


def trained(settings: dict[str, Any], *, count: int = 80, epochs: float = 1) -> tuple[Guide, list[bool], list[int]]:
    """The guide; whether each step was measuring; how often the components were scored when it decided."""
    torch.manual_seed(0)
    guide = Guide(BERT.build(), Config(**{"budget": 0.8, "probe": {"interval": 0}, **settings}))
    measuring: list[bool] = []
    scored: list[int] = []

    def after_step(guide: Guide) -> None:
        measuring.append(guide.is_measuring)
        scored.append(min((guide.error_map.counts.get(name, 0) for name in guide.partition.names), default=0))

    guided(guide, adamw(guide), Examples(BERT, count), epochs=epochs, collate_fn=collate, after_step=after_step)
    return guide, measuring, scored


@pytest.mark.parametrize("warmup_fraction", [0.05, 0.22])
def test_a_run_too_short_to_learn_anything_from_scores_decides_at_once(warmup_fraction: float) -> None:
    """Of 16 full steps, a phase of 4 would score 3: the next step's gradients judge a step."""
    guide, measuring, scored = trained({"warmup_fraction": warmup_fraction, "mask": {"frozen_fraction": 0.5}})
    assert len(measuring) > 16
    assert not any(measuring)
    assert set(scored) == {0}
    assert [plan.step for plan in guide.plans] == [0]
    assert guide.plans[0].cut == 2
    assert guide.run_plan is not None
    assert "nothing measured first" in guide.run_plan.reason


def test_one_step_more_is_measured_and_is_enough() -> None:
    guide, measuring, scored = trained({"warmup_fraction": 0.27, "mask": {"frozen_fraction": 0.5}})
    assert [plan.step for plan in guide.plans] == [ENOUGH + 1]
    assert measuring[: ENOUGH + 1] == [True] * (ENOUGH + 1)
    assert not any(measuring[ENOUGH + 1 :])
    assert scored[ENOUGH] == ENOUGH


@pytest.mark.parametrize(
    "mask", [{"name": "target_sparsity", "fraction": 0.5}, {"name": "top_fraction", "fraction": 0.5}]
)
def test_what_follows_the_first_score_waits_for_it_however_short_the_run(mask: dict[str, Any]) -> None:
    settings = {"scaling": None, "mask": mask, "warmup_fraction": 0.05, "probe": {"interval": 2, "size": 2}}
    guide, measuring, scored = trained(settings)
    assert measuring[0]
    assert guide.plans[0].step > 0
    assert max(scored) > 0


def test_probes_are_decided_by_later(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    decide = Composed.decide

    def watched(policy: Composed, situation: Situation) -> UpdatePlan:
        if situation.flops_left:
            asked.append((situation.step, min(situation.error_map.counts.values(), default=0)))
        return decide(policy, situation)

    monkeypatch.setattr(Composed, "decide", watched)
    settings = {"warmup_fraction": 0.05, "probe": {"interval": 2, "size": 4}}
    guide, measuring, _ = trained(settings, count=160)
    assert not any(measuring)
    assert asked[0] == (0, 0)
    assert [step for step, _ in asked[1:5]] == [2, 4, 6, 8]
    assert asked[4][1] == ENOUGH
    assert guide.ledger.probes >= ENOUGH


def test_repeated_examples_are_not_scored_and_so_not_waited_for() -> None:
    """Of two batches an epoch, however long the run."""
    guide, measuring, scored = trained({"warmup_fraction": 0.5, "mask": {"frozen_fraction": 0.5}}, count=8, epochs=20)
    assert len(measuring) > 20
    assert not any(measuring)
    assert set(scored) == {0}
    assert guide.plans[0].step == 0


def test_a_budget_below_a_step_of_everything_is_spent_on_cheaper_ones() -> None:
    """Before the first decision the budget is held against what can be decided, not against everything."""
    guide, measuring, _ = trained({"budget": 0.03, "mask": {"frozen_fraction": 1.0}})
    assert guide.costs is not None
    everything = guide.costs.step_flops(guide.partition.names, rows=4, tokens=12).total
    assert guide.run_plan is not None
    assert guide.run_plan.flops < everything
    assert guide.step_count >= 1
    assert not any(measuring)
    assert guide.ledger.spent_flops <= guide.run_plan.flops
