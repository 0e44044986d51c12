"""Freezing is not absorbing: what is off is observed, held meanwhile, and comes back; no plan sees its own batch."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from rgft import Config, Guide
from rgft.allocation.base import Situation
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, changed, collate, guided, weights_of
from tests.integration.policies import Scripted, steer

CUT = {"warmup_fraction": 0.2, "probe": {"interval": 2, "size": 2}, "mask": {"frozen_fraction": 1.0}}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("bert", "layer"), ("bert", "head"), ("llama", "head"), ("gpt2", "layer"), ("t5", "block"), ("resnet", "layer"),
     ("peft_lora", "adapter"), ("torch_transformer_encoder", "layer")],
)  # fmt: skip
def test_probes_observe_everything_through_the_cut(name: str, granularity: str) -> None:
    family = FAMILIES[name]
    guide = Guide(family.build(), Config(granularity=granularity, **CUT))
    history: list[tuple[int, bool, dict[str, int], dict[str, float]]] = []
    guided(
        guide, adamw(guide), Examples(family, count=40), batch_size=4,
        after_step=lambda g: history.append(
            (g.plan.cut, len(g.map_history), dict(g.error_map.counts), g.error_map.values())
        ),
    )  # fmt: skip
    off = [c.name for c in guide.partition if c.depth < guide.plan.cut]
    assert off
    probed = held = 0
    for (cut, probes, old, values), (_, later, new, now) in pairwise(history):
        if not cut:
            continue
        if later == probes:  # no observation: held, not zeroed
            assert (new, now) == (old, values)
            held += 1
        else:
            assert all(new[name] == old.get(name, 0) + 1 for name in new)
            assert set(off) <= set(new)
            probed += 1
    assert probed >= 2
    assert held >= 2


def test_what_the_policy_prefers_now_is_on_again() -> None:
    """A policy that follows the map: everything goes to the classifier first, and back when the map says so."""
    family = FAMILIES["bert"]
    config = Config(
        signal="grad_norm", scaling="uniform", probe={"interval": 2, "size": 2}, warmup_fraction=0.0
    )  # fmt: skip
    guide = Guide(family.build(), config)
    bottom, top = guide.partition.names[0], guide.partition.names[-1]

    def prefers(situation: Situation) -> set[str]:
        # Three observations of the bottom, made while it is off, are what turns it on.
        return {top, bottom} if situation.error_map.counts.get(bottom, 0) >= 3 else {top}

    steer(guide, Scripted(prefers), follows_map=True)
    was_on: list[bool] = []
    moved: list[bool] = []
    before = weights_of(guide)

    def record(guide: Guide) -> None:
        nonlocal before
        was_on.append(bottom in guide.active)
        moved.append(bottom in changed(guide, before))
        before = weights_of(guide)

    guided(guide, adamw(guide), Examples(family, count=40), after_step=record)
    assert was_on == [False] * was_on.count(False) + [True] * was_on.count(True)
    assert 3 <= was_on.count(False) <= 6
    assert was_on.count(True) >= 2
    assert moved == was_on


@pytest.mark.parametrize("preset", ["rgft", "proposal_a", "proposal_b"])
def test_a_plan_uses_nothing_of_the_batch_it_is_applied_to(preset: str) -> None:
    """Batch t perturbed: plan t is the same; where training batches are scored, plan t+1 is another."""
    family, perturbed = FAMILIES["bert"], 3
    settings: dict[str, Any] = {"preset": preset}
    if preset != "proposal_b":
        settings["probe"] = {"interval": 1, "size": 2} if preset == "rgft" else {"interval": 2, "size": 2}
    plans: list[list[tuple[int, dict[str, float]]]] = []
    for poison in (False, True):
        torch.manual_seed(0)
        guide = Guide(family.build(), Config(**settings))
        optimizer = adamw(guide, lr=1e-3)
        guide.set_optimizer(optimizer)
        taken = []
        for step, batch in enumerate(guide.batches(Examples(family, count=40), batch_size=4, collate_fn=collate)):
            if poison and step == perturbed:
                batch = {**batch, "input_ids": batch["input_ids"].flip(0), "labels": (batch["labels"] + 1) % 3}
            guide.loss(batch).backward()
            taken.append((guide.plan.cut, dict(guide.plan.multipliers)))
            guide.step(optimizer)
            optimizer.zero_grad()
        plans.append(taken)
    clean, poisoned = plans
    assert clean[: perturbed + 1] == poisoned[: perturbed + 1]
    assert clean[perturbed + 1 :] != poisoned[perturbed + 1 :]
    if preset == "proposal_b":
        assert clean[perturbed + 1] != poisoned[perturbed + 1]


def test_probes_are_never_trained_on() -> None:
    family = FAMILIES["bert"]
    data = Examples(family, count=40)
    guide = Guide(family.build(), Config(probe={"interval": 2, "size": 2}))
    batches, _ = guided(guide, adamw(guide), data, epochs=2)
    trained = {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}
    everything = {tuple(row["input_ids"].tolist()) for row in data.rows}
    assert guide._prober.pool is not None
    pool = {tuple(data[i]["input_ids"].tolist()) for i in guide._prober.pool._pool}
    assert len(pool) == 4
    assert trained == everything - pool


def test_a_probe_moves_nothing() -> None:
    family = FAMILIES["conv_net"]  # BatchNorm statistics too
    guide = Guide(family.build(), Config(probe={"interval": 2, "size": 2}))
    optimizer = adamw(guide)
    guided(guide, optimizer, Examples(family, count=40), steps=4)
    state, moments = copy.deepcopy(guide.model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random, modes = torch.get_rng_state(), [m.training for m in guide.model.modules()]
    flags = [p.requires_grad for p in guide.model.parameters()]
    counts = dict(guide.error_map.counts)
    assert guide._decisions.probe()
    assert all(guide.error_map.counts[name] == count + 1 for name, count in counts.items())
    for key, value in guide.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key, value in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value[name], moments["state"][key][name]) for name in value)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in guide.model.modules()] == modes
    assert [p.requires_grad for p in guide.model.parameters()] == flags
    assert all(p.grad is None for p in guide.model.parameters())
