"""What pairs cost, modelled, against `FlopCounterMode` on the models that compute with them."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch

from rgft import Config, Guide
from rgft.errors import RGFTWarning
from rgft.execution.probing import still
from rgft.plan import UpdatePlan
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, adamw, collate

RANK = 3


def attached(name: str, others: str, **settings: Any) -> Guide:
    """A guide that has traced its costs."""
    family = FAMILIES[name]
    config = Config(
        preset="full", update={"low_rank": {"rank": RANK, "others": others}}, execution={"cache": "none"}, **settings
    )  # fmt: skip
    guide = Guide(family.build(), config)
    guide.open(Examples(family, tokens=12), batch_size=4, collate_fn=collate)
    return guide


def put_into_force(guide: Guide, active: set[str], low_rank: set[str], step: int) -> None:
    multipliers = {name: float(name in active) for name in guide.partition.names}
    plan = UpdatePlan(step=step, multipliers=multipliers, low_rank=tuple(sorted(low_rank)))
    guide._executor.apply(plan, step)


@pytest.mark.parametrize("others", ["dense", "frozen"])
@pytest.mark.parametrize("granularity", ["layer", "block", "head"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "phi3"])
def test_steps_execute_what_is_modelled(name: str, granularity: str, others: str) -> None:
    settings: dict[str, Any] = {"ffn_blocks": 2} if granularity == "head" else {}
    guide = attached(name, others, granularity=granularity, **settings)
    model, candidates, names = guide.model, guide._binding.low_rank.sites, guide.partition.names  # type: ignore[union-attr]
    draw = random.Random(0)
    optimizer = adamw(guide, lr=0.1)
    batch = FAMILIES[name].batch(3, 20)
    shares = [(0.0, 1.0), (0.4, 1.0), (1.0, 0.5), (0.4, 0.5), (0.7, 0.0), (1.0, 1.0)]
    for step, (share_on, share_paired) in enumerate(shares):
        # The first plan trains the top alone, so that other pairs are not part of the model yet.
        on = {n for n in names if draw.random() < share_on} | {guide.partition.components[-1].name}
        on |= {draw.choice(sorted(candidates))}
        put_into_force(guide, on, {n for n in candidates if draw.random() < share_paired}, step)
        assert guide.costs is not None
        costs = guide._executor.with_pairs(guide.costs)
        counted = count_flops(lambda: loss_of(model, batch).backward())
        modelled = costs.step_flops(on, rows=3, tokens=20).total
        assert modelled == pytest.approx(counted, rel=1e-6), (step, share_on, share_paired)
        optimizer.step()
        optimizer.zero_grad()
    guide.detach()


@pytest.mark.parametrize("others", ["dense", "frozen"])
def test_probes_and_evaluation_execute_what_is_modelled(others: str) -> None:
    guide = attached("bert", others, granularity="layer")
    batch = FAMILIES["bert"].batch(3, 20)
    assert guide.costs is not None
    before = guide.costs.forward_flops(3, 20)
    put_into_force(guide, {guide.partition.names[2]}, set(guide._binding.low_rank.sites), 0)  # type: ignore[union-attr]
    costs = guide._executor.with_pairs(guide.costs)
    with still(guide.model, guide._binding):
        counted = count_flops(lambda: loss_of(guide.model, batch).backward())
    assert costs.probe_flops(3, 20, weights=True) == pytest.approx(counted, rel=1e-6)
    guide.model.eval()
    with torch.enable_grad():
        counted = count_flops(lambda: loss_of(guide.model, batch))
    assert before < costs.forward_flops(3, 20) == pytest.approx(counted, rel=1e-6)
    full = costs.full_step(3, 20)
    assert full == guide.costs.full_step(3, 20)
    assert type(costs).from_dict(costs.to_dict()) == costs


def test_a_pair_costs_what_its_shapes_say() -> None:
    """2 N r (I + O) forward, as much for dA and dB, and what leads there; no dense dW is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RGFTWarning)
        guide = attached("mlp", "frozen", granularity="layer")
    model, rank = guide.model, RANK
    name = next(iter(guide._binding.low_rank.sites))  # type: ignore[union-attr]
    (site,) = guide._binding.low_rank.sites[name]  # type: ignore[union-attr]
    assert guide.costs is not None
    dense = guide.costs.step_flops({name}, rows=5, tokens=1, low_rank=frozenset())
    paired = guide.costs.step_flops({name}, rows=5, tokens=1)
    weight = 2 * 5 * site.inputs * site.outputs
    pair = 2 * 5 * rank * (site.inputs + site.outputs)
    assert model.get_submodule(site.module).weight.numel() == site.inputs * site.outputs
    assert dense.pairs == paired.dw == 0.0
    assert dense.dw == pytest.approx(weight)
    assert (paired.forward, paired.dx) == (dense.forward, dense.dx)
    # Forward, dA and dB, and the gradient of x Aᵀ; of x, which is data, none is wanted.
    assert paired.pairs == pytest.approx(2 * pair + 2 * 5 * rank * site.outputs)
