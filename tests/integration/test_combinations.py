"""Everything composes: each combination trains as the masked reference does, step by step on the same batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import AdamW

from rgft import Config, Guide
from rgft.components import Granularity, Partition
from rgft.errors import AttachError
from rgft.execution.reference import ReferenceUpdate, reference_gradients
from rgft.partition import partition
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, trimmed, without_dropout
from tests.integration.loops import guided as train
from tests.integration.policies import Scripted, steer

LR, DECAY, CLIP = 1e-3, 0.1, 0.05
Batch = dict[str, Tensor]
#: Heads own rows and columns, blocks of neurons too.
FFN_BLOCKS = {"head": {"ffn_blocks": 2}}


def is_on(components: Partition, step: int) -> set[str]:
    """Above a cut at layer 2, every component but a fourth of them, which changes with the step."""
    above = [c.name for c in components if c.depth >= 2]
    return {name for position, name in enumerate(above) if (position + step) % 4 or name in (above[0], above[-1])}


def loss_under(precision: str) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(model, batch)

    return loss


def guided(
    model: nn.Module, *, precision: str, accumulation: int, clip: bool, cache: str, granularity: Granularity,
    fused: bool, examples: int = 16, call: Callable[[nn.Module], Any] = lambda model: model,
) -> tuple[Guide, list[list[Batch]]]:  # fmt: skip
    """A guided run, and the micro-batches of each of its steps."""
    loss = loss_under(precision)
    config = Config(
        granularity=granularity, execution={"cache": cache}, update={"average_last": 0.0},
        classifier_lr_multiplier=1.0, probe={"interval": 0}, **FFN_BLOCKS.get(granularity, {}),
    )  # fmt: skip
    guide = Guide(model, config, loss=loss)
    steer(guide, Scripted(lambda s: is_on(guide.partition, s.step)))
    guide.accumulation = accumulation
    optimizer = AdamW(guide.param_groups(lr=LR), weight_decay=DECAY, fused=fused, foreach=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = DECAY
    called = call(model)
    steps: list[list[Batch]] = []
    waiting: list[Batch] = []
    for batch in guide.batches(Examples(FAMILIES["bert"], count=examples), batch_size=2, collate_fn=trimmed, epochs=2):
        if not waiting:
            guide.begin_step()
        (loss(called, batch) / accumulation).backward()
        waiting.append(batch)
        if len(waiting) == accumulation:
            guide.step(optimizer, max_grad_norm=CLIP if clip else None)
            optimizer.zero_grad()
            steps.append(waiting)
            waiting = []
    guide.detach()
    return guide, steps


def referred(
    model: nn.Module, steps: list[list[Batch]], *, precision: str, clip: bool, granularity: Granularity
) -> nn.Module:
    """The same steps by dense gradients, sliced and masked."""
    loss = loss_under(precision)
    components = partition(model, granularity, **FFN_BLOCKS.get(granularity, {}))
    reference = ReferenceUpdate(
        model, components, lambda groups: AdamW(groups, lr=LR, weight_decay=DECAY, foreach=False)
    )
    for number, batches in enumerate(steps):
        active = is_on(components, number)

        def mean(net: nn.Module, batches: list[Batch] = batches) -> Tensor:
            return torch.stack([loss(net, batch) for batch in batches]).mean()

        scale = 1.0
        if clip:
            found = reference_gradients(model, components, mean)
            norm = sum(float(g.double().square().sum()) for n in active for g in found[n] if g is not None) ** 0.5
            scale = CLIP / norm
            assert scale < 1.0
        reference.step(lambda net, mean=mean, scale=scale: scale * mean(net), active)
    return model


def assert_trained_alike(model: nn.Module, reference: nn.Module, before: nn.Module, tolerance: float) -> None:
    """‖θ − θ_ref‖ ≤ tolerance · ‖θ_ref − θ_0‖, over all of them; what did not move in one did not in the other."""
    apart, moved = [], []
    for (name, found), expected, start in zip(
        model.named_parameters(), reference.parameters(), before.parameters(), strict=True
    ):
        if torch.equal(expected, start):
            assert torch.equal(found, start), name
        apart.append((found - expected).detach().norm())
        moved.append((expected - start).detach().norm())
    assert torch.stack(moved).norm() > 0.0
    assert torch.stack(apart).norm() <= tolerance * torch.stack(moved).norm()


def checkpoint(model: Any, **options: Any) -> None:
    model.gradient_checkpointing_enable(options)


TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


@pytest.mark.parametrize("granularity", ["layer", "block", "head"])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_cache_granularity_with_all_of_the_rest(precision: str, cache: str, granularity: Granularity) -> None:
    for accumulation, clip, fused in itertools.product((1, 2), (False, True), (False, True)):
        model = without_dropout(FAMILIES["bert"].build())
        before, plain = copy.deepcopy(model), copy.deepcopy(model)
        guide, steps = guided(
            model, precision=precision, accumulation=accumulation, clip=clip, cache=cache, granularity=granularity,
            fused=fused,
        )  # fmt: skip
        assert len(steps) == 16 // accumulation
        if guide.cache is not None:
            assert guide.cache.hits == 16
        reference = referred(plain, steps, precision=precision, clip=clip, granularity=granularity)
        assert_trained_alike(model, reference, before, TOLERANCE[precision])


WITH_HEADS = ["distilbert", "gpt2", "gpt_neox", "llama", "mixtral", "t5", "vit", "torch_transformer_encoder"]


def is_one_block(tensor: Tensor) -> bool:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()


@pytest.mark.parametrize("name", WITH_HEADS)
def test_fused_kernels_step_the_heads_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    start = without_dropout(family.build())
    ends: list[nn.Module] = []
    for fused in (False, True):
        torch.manual_seed(0)  # some families keep their dropout
        model = copy.deepcopy(start)
        guide = Guide(model, Config(preset="full", granularity="head", ffn_blocks=2))
        steer(guide, Scripted(lambda s, guide=guide: is_on(guide.partition, s.step)))
        optimizer = AdamW(guide.param_groups(lr=LR, weight_decay=DECAY), fused=fused, foreach=False)
        train(guide, optimizer, Examples(family, count=24), steps=6, clip=CLIP)
        assert all(is_one_block(p) for p in model.parameters()) == fused
        guide.detach()
        ends.append(model)
    assert_trained_alike(ends[1], ends[0], start, TOLERANCE["fp32"])


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_gradient_checkpointing(cache: str, granularity: Granularity) -> None:
    for fused in (False, True):
        model = without_dropout(FAMILIES["bert"].build())
        before, plain = copy.deepcopy(model), copy.deepcopy(model)
        checkpoint(model, use_reentrant=False)
        guide, steps = guided(
            model, precision="fp32", clip=False, granularity=granularity, accumulation=1, cache=cache, fused=fused
        )
        if guide.cache is not None:
            assert guide.cache.hits == 16
        reference = referred(plain, steps, precision="fp32", clip=False, granularity=granularity)
        assert_trained_alike(model, reference, before, TOLERANCE["fp32"])


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}])
def test_reentrant_checkpointing_is_refused_for_it_trains_no_layer_above_a_cut(options: dict[str, bool]) -> None:
    model = FAMILIES["bert"].build()
    checkpoint(model, **options)  # without the key, torch takes the reentrant kind
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttachError, match="use_reentrant=False"):
        guided(model, precision="fp32", clip=False, granularity="layer", accumulation=1, cache="none", fused=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_lowest_layer_without_a_gradient_is_an_error_however_it_came_about() -> None:
    model: Any = FAMILIES["bert"].build()
    guide = Guide(model, Config(preset="full"))
    steer(guide, Scripted(lambda s: is_on(guide.partition, s.step)))
    batch = next(iter(guide.batches(Examples(FAMILIES["bert"]), batch_size=2, collate_fn=trimmed)))
    inner = model.bert.encoder.layer[1].forward

    def by_hand(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda h: inner(h, *args, **kwargs), hidden, use_reentrant=True)

    model.bert.encoder.layer[1].forward = by_hand
    guide.loss(batch).backward()
    with pytest.raises(AttachError, match="the lowest layer that trains got no gradient"):
        guide.step(AdamW(guide.param_groups(lr=LR)))


@pytest.mark.parametrize("cache", [pytest.param("none", marks=pytest.mark.slow), "memory"])
def test_torch_compile(cache: str) -> None:
    torch.compiler.reset()
    model = without_dropout(FAMILIES["bert"].build())
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    guide, steps = guided(
        model, precision="fp32", clip=False, granularity="layer", accumulation=1, cache=cache, fused=False, examples=8,
        call=lambda model: torch.compile(model, backend="aot_eager"),
    )  # fmt: skip
    assert len(steps) == 8
    if guide.cache is not None:
        assert guide.cache.hits == 8
    reference = referred(plain, steps, precision="fp32", clip=False, granularity="layer")
    assert_trained_alike(model, reference, before, TOLERANCE["fp32"])
