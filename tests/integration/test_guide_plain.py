"""Everything on, multipliers 1: a guide's loop is plain training, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rgft import Config, Guide
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, assert_same_state, guided, plain, plain_adamw

SPLITTABLE = ["bert", "gpt2", "llama", "t5", "mixtral", "vit", "peft_llama_lora", "resnet", "efficientnet"]


def compare(name: str, settings: dict[str, Any], *, decay: float, accumulation: int, probed: bool) -> None:
    family = FAMILIES[name]
    model = family.build()
    expected = copy.deepcopy(model)
    guide = Guide(model, Config(**settings))
    torch.manual_seed(1)
    optimizer = adamw(guide, weight_decay=decay)
    plans = []
    batches, _ = guided(
        guide, optimizer, Examples(family), accumulation=accumulation, steps=5,
        after_step=lambda g: plans.append(g.plan),
    )  # fmt: skip
    assert len(plans) >= 3
    assert all(f == 1.0 for plan in plans for f in plan.multipliers.values())
    assert bool(guide.ledger.probes) == probed
    torch.manual_seed(1)
    plain(expected, plain_adamw(expected, weight_decay=decay), batches, accumulation=accumulation)
    assert_same_state(model, expected)
    guide.detach()
    assert_same_state(model, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_preset_full_is_plain_adamw(name: str) -> None:
    """Families alternate between decay and none, accumulation and none; `test_full_…` below has all four for one."""
    position = list(FAMILIES).index(name)
    compare(name, {"preset": "full"}, decay=0.1 * (position % 2), accumulation=1 + position // 2 % 2, probed=False)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_all_of_the_budget_is_all_of_the_batches(accumulation: int) -> None:
    """The last batch is smaller than the usual one."""
    family = FAMILIES["bert"]
    model = family.build()
    expected = copy.deepcopy(model)
    guide = Guide(model, Config(preset="full", budget=1.0))
    torch.manual_seed(1)
    batches, _ = guided(guide, adamw(guide), Examples(family, count=34), batch_size=4, accumulation=accumulation)
    assert [len(batch["labels"]) for batch in batches] == [4] * 8 + [2]
    assert guide.flops_fraction == 1.0
    torch.manual_seed(1)
    plain(expected, plain_adamw(expected), batches, accumulation=accumulation)
    assert_same_state(model, expected)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_full_with_and_without_decay_and_accumulation(name: str, decay: float, accumulation: int) -> None:
    compare(
        name, {"preset": "full", "granularity": "head", "ffn_blocks": 2}, decay=decay, accumulation=accumulation,
        probed=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_preset_rgft_is_plain_adamw_while_it_measures(name: str) -> None:
    """Probes and scores of training gradients move nothing, dropout's random numbers included."""
    settings = {
        "execution": {"positions": "all"}, "update": {"dropout": "model"}, "warmup_fraction": 0.99,
        "probe": {"interval": 2, "size": 2},
    }  # fmt: skip
    compare(name, settings, decay=0.1, accumulation=1, probed=True)


@pytest.mark.parametrize("name", SPLITTABLE)
def test_preset_rgft_at_head_granularity_is_plain_adamw_while_it_measures(name: str) -> None:
    settings = {
        "granularity": "head", "ffn_blocks": 3, "execution": {"positions": "all"}, "update": {"dropout": "model"},
        "warmup_fraction": 0.99, "probe": {"interval": 2, "size": 2},
    }  # fmt: skip
    compare(name, settings, decay=0.1, accumulation=1, probed=True)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_with_clipping_weights_differ_by_rounding_only(name: str) -> None:
    """Norm-of-norms over views differs from the whole weights' norm in the last bit."""
    family = FAMILIES[name]
    model = family.build()
    expected, start = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    guide = Guide(model, Config(preset="full", granularity="head"))
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(guide.param_groups(lr=0.1), lr=0.1, momentum=0.9)
    batches, _ = guided(guide, optimizer, Examples(family), clip=0.05)
    torch.manual_seed(1)
    whole = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    plain(expected, whole, batches, clip=0.05)
    found = model.state_dict()
    moved = 0
    for key, value in expected.state_dict().items():
        if value.is_floating_point():
            assert (found[key] - value).norm() <= 1e-6 * value.norm() + 1e-12, key
            moved += bool((value - start[key]).norm() > 1e-4 * value.norm())
    assert moved > 3
