"""Steps of several micro-batches: begun where the budget pays for all of them, and ended once begun."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rgft import Config, Guide
from rgft.errors import AttachError, BudgetError
from rgft.run import StepReport
from rgft.tasks.base import PreparedTask
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, collate, guided, trimmed
from tests.integration.test_search import UNLIMITED, prepared, run_of  # noqa: F401

BATCHES = 54  # of two examples each, in an epoch of the prepared task


@pytest.mark.parametrize("collate_fn", [collate, trimmed])
@pytest.mark.parametrize("accumulation", [2, 8, 16])
def test_no_step_is_left_open(accumulation: int, collate_fn: Any) -> None:
    guide = Guide(FAMILIES["bert"].build(), Config(preset="full", budget=0.3))
    guide.accumulation = accumulation
    batches, _ = guided(
        guide, adamw(guide), Examples(FAMILIES["bert"], 200), batch_size=2, epochs=2, accumulation=accumulation,
        collate_fn=collate_fn,
    )  # fmt: skip
    assert guide.step_count >= 2
    assert len(batches) == accumulation * guide.step_count
    spent = guide.summary()["flops"]["fraction_of_full"]
    # Another step would not have been paid for.
    assert 0.3 * (1.0 - 1.6 / guide.step_count) < spent <= 0.3


@pytest.mark.parametrize(("budget", "steps"), [(None, 13), (0.5, 6)])
def test_a_run_is_planned_in_optimizer_steps(budget: float | None, steps: int) -> None:
    guide = Guide(FAMILIES["bert"].build(), Config(preset="full", budget=budget))
    guide.accumulation = 4
    optimizer = adamw(guide)
    guided(guide, optimizer, Examples(FAMILIES["bert"], 50), batch_size=2, epochs=2, accumulation=4)
    if budget is None:  # the data end inside the last one
        guide.step(optimizer)
    assert guide.run_plan is not None
    assert guide.run_plan.steps == guide.step_count == steps


@pytest.mark.parametrize("accumulation", [1, 4])
def test_shares_of_a_run_are_of_its_steps(accumulation: int) -> None:
    """Two layers freeze at an even pace in the first half of a run of 32 batches."""
    policy = {"name": "gradual_freezing", "keep": 0, "until": 0.5}
    guide = Guide(FAMILIES["bert"].build(), Config(policy=policy))
    guide.accumulation = accumulation
    cuts: list[int] = []
    guided(
        guide, adamw(guide), Examples(FAMILIES["bert"], 64), batch_size=2, accumulation=accumulation,
        after_step=lambda g: cuts.append(g.plan.cut),
    )  # fmt: skip
    quarter = 8 // accumulation
    assert cuts == [*[0] * quarter, *[2] * quarter, *[3] * 2 * quarter]


def test_probes_are_planned_by_optimizer_steps() -> None:
    config = Config(probe={"interval": 4, "size": 2}, warmup_fraction=0.0)
    guide = Guide(FAMILIES["bert"].build(), config)
    guide.accumulation = 4
    guided(guide, adamw(guide), Examples(FAMILIES["bert"], 64), batch_size=2, epochs=2, accumulation=4)
    assert guide.run_plan is not None
    assert (guide.run_plan.steps, guide.run_plan.probes) == (16, 4)


def test_the_last_step_weighs_its_examples_as_others_do(prepared: PreparedTask) -> None:  # noqa: F811
    reports: list[StepReport] = []
    run = run_of(
        prepared, UNLIMITED, settings={"lr": 1e-9, "epochs": 1, "accumulation": 50}, observers=[reports.append]
    )
    gradients: list[float] = []
    step = torch.optim.AdamW.step

    def noting(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        gradients.append(math.sqrt(sum(float(p.grad.norm()) ** 2 for g in optimizer.param_groups for p in g["params"])))
        return step(optimizer, *args)

    run.optimizer.step = noting.__get__(run.optimizer)
    run.train()
    assert len(reports) == len(gradients) == 2
    # Of four micro-batches in place of fifty: were it divided by fifty, it would be .05 and not about .7.
    assert reports[-1].loss == pytest.approx(math.log(2.0), abs=0.1)
    assert gradients[-1] > 0.5 * gradients[0]
    run.close()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"budget": 0.1}, {"accumulation": 30}, "less than one step of the cheapest plan .* of 30 micro-batches"),
        ({"budget": {"seconds": 1e-9}}, {}, "the budget of 1e-09 s is less than a step|before the first step"),
    ],
)
def test_a_budget_that_pays_for_no_step_is_refused(
    prepared: PreparedTask, config: dict[str, Any], settings: dict[str, Any], message: str  # noqa: F811
) -> None:  # fmt: skip
    run = run_of(prepared, {**config, "seed": 5}, settings={"lr": 1e-3, "epochs": 1, **settings})
    with pytest.raises(BudgetError, match=message):
        run.train()
    assert run.guide.step_count == 0
    run.close()


def test_a_model_in_evaluation_mode_is_refused_before_anything_is_computed() -> None:
    guide = Guide(FAMILIES["bert"].build().eval(), Config(preset="full"))
    batch = next(guide.batches(Examples(FAMILIES["bert"]), batch_size=4, collate_fn=collate))
    with pytest.raises(AttachError, match=r"call model.train\(\) before the loop"):
        guide.loss(batch)
    guide.model.train()
    guide.loss(batch)


def test_a_guide_has_one_run() -> None:
    data = Examples(FAMILIES["bert"])
    guide = Guide(FAMILIES["bert"].build(), Config(preset="full"))
    guided(guide, adamw(guide), data)
    with pytest.raises(AttachError, match="gone through to its end already"):
        guided(guide, adamw(guide), data)
