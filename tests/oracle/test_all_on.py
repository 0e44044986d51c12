"""Everything on: training views of a model is training the model, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rgft.execution.reference import reference_gradients
from rgft.execution.views import bind
from rgft.partition import partition
from tests.families import FAMILIES, loss_of


def adamw(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=decay, foreach=False)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    seed: int,
    autocast: bool = False,
) -> None:
    torch.manual_seed(seed)  # dropout
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        (loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(model: nn.Module, plain: nn.Module) -> None:
    found, expected = model.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_three_adamw_steps_at_head_granularity(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain = copy.deepcopy(model)
    binding = bind(model, partition(model, "head", ffn_blocks=3))
    decay = 0.1 * (len(name) % 2)
    optimizers = adamw(model, decay), adamw(plain, decay)
    for seed in range(3):
        micro_batches = [family.batch(rows=2, seed=10 * seed + i) for i in range(1 + seed % 2)]
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            step(net, optimizer, micro_batches, seed)
    assert_same(model, plain)
    binding.restore()
    assert_same(model, plain)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("setting", ["eager", "sdpa", "autocast", "checkpointing"])
def test_settings_that_change_the_forward(name: str, setting: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    if setting in ("eager", "sdpa"):
        model.set_attn_implementation(setting)  # type: ignore[operator]
    if setting == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    plain = copy.deepcopy(model)
    bind(model, partition(model, "head", ffn_blocks=2))
    optimizers = adamw(model, 0.1), adamw(plain, 0.1)
    for seed in range(2):
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            step(net, optimizer, [family.batch(seed=seed)], seed, autocast=setting == "autocast")
    assert_same(model, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_second_component_against_the_reference(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), family.batch()
    components = partition(model, "head", ffn_blocks=2)

    def loss(net: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return loss_of(net, batch)

    expected = reference_gradients(copy.deepcopy(model), components, loss)
    binding = bind(model, components)
    for position, (_, parameters) in enumerate(binding):
        for parameter in parameters:
            parameter.requires_grad_(position % 2 == 0)
    loss(model).backward()
    for position, (component, parameters) in enumerate(binding):
        dense = expected[component.name]
        norm = sum(float(g.norm()) ** 2 for g in dense if g is not None) ** 0.5
        for parameter, gradient in zip(parameters, dense, strict=True):
            if position % 2 or gradient is None:
                assert parameter.grad is None or not parameter.grad.any()
            else:
                found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
                assert (found - gradient).norm() <= 1e-5 * norm, component.name
