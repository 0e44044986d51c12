"""Pairs against W + s · B A as plain autograd, and against PEFT's LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

from rgft import Config, Guide
from rgft.execution.low_rank import LowRank
from tests.families import FAMILIES, loss_of
from tests.integration.loops import without_dropout

RANK, ALPHA, LR = 3, 6.0, 1e-2
Batch = dict[str, Tensor]


def guided(name: str, granularity: Any, **low_rank: Any) -> tuple[Guide, nn.Module]:
    """A guide on a model without dropout, in float64, and a plain copy of the model."""
    model = without_dropout(FAMILIES[name].build()).double()
    twin = copy.deepcopy(model)
    blocks = {"ffn_blocks": 2} if granularity == "head" else {}
    config = Config(
        preset="full", granularity=granularity, **blocks,
        update={"low_rank": {"rank": RANK, "alpha": ALPHA, "lr_multiplier": 1.0, **low_rank}},
    )  # fmt: skip
    return Guide(model, config), twin


def low_rank_of(guide: Guide) -> LowRank:
    assert guide._binding.low_rank is not None
    return guide._binding.low_rank


class Reference:
    """A plain model whose weights are W + s · B A, slice by slice, put together by autograd."""

    def __init__(self, plain: nn.Module, guide: Guide) -> None:
        low_rank = low_rank_of(guide)
        self.plain, self.sites = plain, low_rank.sites
        self.pairs = {
            name: [p.detach().clone().requires_grad_() for p in pairs] for name, pairs in low_rank.pairs.items()
        }
        self.weights = {name: p.detach().clone() for name, p in plain.named_parameters()}

    def loss(self, batch: Batch) -> Tensor:
        added: dict[str, Tensor] = {}
        for name, sites in self.sites.items():
            for index, site in enumerate(sites):
                a, b = self.pairs[name][2 * index : 2 * index + 2]
                delta = ALPHA / RANK * (b @ a)
                delta = delta if site.layout.output_dim == 0 else delta.t()
                whole = torch.zeros(site.part.shape, dtype=delta.dtype)
                dim, start, stop = site.part.dim, site.part.start, site.part.stop
                placed = delta if dim is None else whole.slice_scatter(delta, dim, start, stop)
                known = added.get(site.part.parameter)
                added[site.part.parameter] = placed if known is None else known + placed
        weights = {name: w + added[name] if name in added else w for name, w in self.weights.items()}
        return functional_call(self.plain, weights, kwargs=batch).loss

    @property
    def parameters(self) -> list[Tensor]:
        return [p for pairs in self.pairs.values() for p in pairs]


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5", "vit"])
def test_gradients_are_those_of_the_merged_weight(name: str, granularity: str) -> None:
    guide, twin = guided(name, granularity)
    low_rank, family = low_rank_of(guide), FAMILIES[name]
    with torch.no_grad():
        for pairs in low_rank.pairs.values():
            for pair in pairs:
                pair.normal_(std=0.3, generator=torch.Generator().manual_seed(pair.numel()))
    reference = Reference(twin.eval(), guide)
    guide.model.eval()
    guide._executor.apply(guide.plan, 0)
    loss, expected = loss_of(guide.model, family.batch()), reference.loss(family.batch())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert float(loss.detach()) != pytest.approx(float(loss_of(twin, family.batch()).detach()), rel=1e-4)
    loss.backward()
    expected.backward()
    for component, pairs in low_rank.pairs.items():
        for live, wanted in zip(pairs, reference.pairs[component], strict=True):
            assert live.grad is not None
            assert wanted.grad is not None
            torch.testing.assert_close(live.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    guide.detach()


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_ten_steps_of_adamw_are_those_of_the_reference(name: str, granularity: str) -> None:
    guide, twin = guided(name, granularity, others="frozen")
    family, low_rank = FAMILIES[name], low_rank_of(guide)
    reference = Reference(twin, guide)
    optimizer = AdamW(guide.param_groups(LR, weight_decay=0.1), lr=LR)
    others = [p for c, ps in guide._binding if c.name not in low_rank.sites for p in ps]
    for group in optimizer.param_groups:  # what has no pairs stays: the reference trains pairs alone
        group["lr"] = LR
    multipliers = {name: float(name in low_rank.sites) for name in guide.partition.names}
    mine = AdamW(reference.parameters, lr=LR, weight_decay=0.1)
    guide._decisions.plan = plan = type(guide.plan)(step=0, multipliers=multipliers, low_rank=tuple(low_rank.sites))
    guide.set_optimizer(optimizer)
    before = [p.detach().clone() for p in others]
    for step in range(10):
        batch = family.batch(seed=step)
        guide._executor.apply(plan, step)
        loss_of(guide.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.loss(batch).backward()
        mine.step()
        mine.zero_grad()
    for component, pairs in low_rank.pairs.items():
        for live, wanted in zip(pairs, reference.pairs[component], strict=True):
            torch.testing.assert_close(live, wanted, rtol=1e-6, atol=1e-9)
            assert live.detach().abs().sum() > 0.0
    assert all(torch.equal(p, old) for p, old in zip(others, before, strict=True))
    batch = family.batch(seed=99)
    expected = float(reference.loss(batch).detach())
    assert float(loss_of(guide.model, batch).detach()) == pytest.approx(expected, rel=1e-9)
    guide.detach()
    assert float(loss_of(guide.model, batch).detach()) == pytest.approx(expected, rel=1e-9)  # merged


def test_trains_as_peft_does() -> None:
    peft = pytest.importorskip("peft")
    guide, twin = guided("bert", "layer", others="frozen")
    low_rank, family = low_rank_of(guide), FAMILIES["bert"]
    modules = {site.module: (name, index) for name, sites in low_rank.sites.items() for index, site in enumerate(sites)}
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(modules))
    adapted = peft.get_peft_model(twin, config).double()
    with torch.no_grad():
        for path, (name, index) in modules.items():
            layer = adapted.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(low_rank.pairs[name][2 * index])
            assert not layer.lora_B["default"].weight.any()
    multipliers = {name: float(name in low_rank.sites) for name in guide.partition.names}
    plan = type(guide.plan)(step=0, multipliers=multipliers, low_rank=tuple(low_rank.sites))
    optimizer = AdamW(guide.param_groups(LR), lr=LR)
    peft_optimizer = AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    guide.set_optimizer(optimizer)
    for step in range(10):
        batch = family.batch(seed=step)
        guide._executor.apply(plan, step)
        for model, stepped in ((guide.model, optimizer), (adapted, peft_optimizer)):
            loss_of(model, batch).backward()
            stepped.step()
            stepped.zero_grad()
    batch = family.batch(seed=99)
    expected = float(loss_of(adapted, batch).detach())
    assert float(loss_of(guide.model, batch).detach()) == pytest.approx(expected, rel=1e-9)
    guide.detach()
    merged = adapted.merge_and_unload()
    for (name, found), expected in zip(guide.model.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=name)
