"""Detaching leaves no trace but trained weights; attaching twice is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.errors import AttachError, CacheError, ConfigError
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, adamw, guided
from tests.integration.policies import Scripted, steer

HOOKS = [name for name in vars(nn.Linear(1, 1)) if "hook" in name]


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that is not the value of a tensor."""
    return {
        "modules": [(name, id(m), type(m), sorted(m.__dict__)) for name, m in model.named_modules()],
        "hooks": {
            (name, hook): list(getattr(module, hook)) for name, module in model.named_modules() for hook in HOOKS
            if hook in module.__dict__ and isinstance(getattr(module, hook), dict)
        },
        "training": [module.training for module in model.modules()],
        "parameters": [(n, id(p), p.requires_grad, p.shape, p.stride()) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "keys": list(model.state_dict()),
    }  # fmt: skip


def rgft_with_a_cut(name: str) -> Config:
    granularity = "head" if name != "mlp" else "layer"
    return Config(
        granularity=granularity, probe={"interval": 2, "size": 2}, warmup_fraction=0.2, mask={"frozen_fraction": 0.5},
        **({"ffn_blocks": 2} if granularity == "head" else {}),
    )  # fmt: skip


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_detach_leaves_no_trace(name: str, fused: bool | None) -> None:
    family = FAMILIES[name]
    model = family.build()
    loss_of(model, family.batch())  # some models keep things from their first forward on
    before, class_attributes = portrait(model), {type(m): set(vars(type(m))) for m in model.modules()}
    guide = Guide(model, rgft_with_a_cut(name))
    guided(guide, adamw(guide, weight_decay=0.1, fused=fused), Examples(family), batch_size=3, steps=8, epochs=2)
    assert guide.plan.cut > 0
    assert portrait(model) != before
    guide.detach()
    after = portrait(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert {type(m): set(vars(type(m))) for m in model.modules()} == class_attributes
    # A model that never met a guide, with these weights, computes the same.
    fresh = family.build(seed=1)
    fresh.load_state_dict(model.state_dict())
    batch = family.batch(seed=9)
    for training in (True, False):
        outputs = []
        for net in (model, fresh):
            torch.manual_seed(3)
            net.train(training).zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            outputs.append([loss, *(p.grad for p in net.parameters())])
        for found, expected in zip(*outputs, strict=True):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["in the loop", "in a frozen layer", "in an active layer", "in the optimizer"])
def test_an_exception_leaves_no_trace_either(where: str) -> None:
    family = FAMILIES["bert"]
    model = family.build()
    layers = model.get_submodule("bert.encoder.layer")

    def fail(*args: Any) -> None:
        raise Interrupted

    before = portrait(model)
    guide = Guide(model, Config(preset="full", granularity="head"))
    last = {c.name for c in guide.partition if c.depth >= 2}
    steer(guide, Scripted(lambda s: last, multipliers=dict.fromkeys(last, 0.5)))
    optimizer = adamw(guide, weight_decay=0.1)
    groups = optimizer.param_groups

    def interrupted_loop() -> None:
        guided(guide, optimizer, Examples(family), steps=2)
        if where == "in the loop":
            raise Interrupted
        if where == "in the optimizer":
            optimizer.register_step_pre_hook(fail)
        else:
            hooks.append(layers[0 if where == "in a frozen layer" else 1].register_forward_hook(fail))
        guided(guide, optimizer, Examples(family), steps=4)

    hooks: list[Any] = []
    with pytest.raises(Interrupted), guide:
        interrupted_loop()
    for hook in hooks:
        hook.remove()
    after = portrait(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert optimizer.param_groups is groups
    assert [group["lr"] for group in groups] == [1e-2] * len(groups)
    Guide(model).detach()  # the model can have another


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model = FAMILIES["bert"].build()
    guide = Guide(model, Config(granularity="head"))
    before = portrait(model)
    with pytest.raises(AttachError, match="has a guide already; call its detach"):
        Guide(model)
    assert portrait(model) == before
    guide.detach()
    with Guide(model) as second:
        guide.detach()  # an old guide's second detach does not take the new one away
        assert model.__dict__["_rgft_guide"] is second
        with pytest.raises(AttachError):
            Guide(model)


def test_a_guide_that_cannot_be_made_leaves_the_model_alone() -> None:
    model = FAMILIES["mlp"].build()
    plain = nn.Linear(4, 2)
    before = portrait(plain)
    with pytest.raises(CacheError, match="needs a model with layers"):
        Guide(plain, Config(execution={"cache": "memory"}))
    assert portrait(plain) == before
    before = portrait(model)
    with pytest.raises(ConfigError, match=r"stability.always_on.*'classifer'; nearest: classifier"):
        Guide(model, Config(stability={"always_on": ("classifer",)}))
    assert portrait(model) == before


def test_a_model_without_gradients_is_refused() -> None:
    model = FAMILIES["mlp"].build().requires_grad_(False)
    with pytest.raises(AttachError, match="no parameter of the model requires gradients"):
        Guide(model)


def test_a_detached_model_does_not_keep_the_guide_alive() -> None:
    model = FAMILIES["mlp"].build()
    guide = Guide(model)
    guided(guide, adamw(guide), Examples(FAMILIES["mlp"]), steps=2)
    guide.detach()
    trained = copy.deepcopy(model)
    del guide
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Guide and o.model in (model, trained)]


def test_without_backward_or_loss_the_step_says_so() -> None:
    family = FAMILIES["mlp"]
    guide = Guide(family.build(), Config(preset="full"))
    optimizer = adamw(guide)
    with pytest.raises(AttachError, match=r"call guide\.loss\(batch\)\.backward\(\) first"):
        guide.step(optimizer)
    guide.loss(family.batch())
    with pytest.raises(AttachError, match="no active component has a gradient"):
        guide.step(optimizer)


def test_the_loss_may_be_per_example() -> None:
    family = FAMILIES["mlp"]
    model = family.build()
    copied = copy.deepcopy(model)

    def per_example(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = net(**batch).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    batch = family.batch()
    with Guide(model, Config(preset="full"), loss=per_example) as guide:
        assert torch.equal(guide.loss(batch), per_example(copied, batch).mean())
