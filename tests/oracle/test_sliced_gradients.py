"""Sliced gradients against the dense reference, for every family, random slices and random active sets."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.execution.binding import Binding
from rgft.execution.reference import ReferenceUpdate, reference_gradients
from rgft.execution.views import bind
from tests.families import FAMILIES, loss_of
from tests.oracle.random_partition import random_partition

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    family = FAMILIES[name]
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.batch().items()}
    model = family.build().to(dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return model, batch


def seeded_loss(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)  # dropout
    return loss_of(model, batch)


def activate(binding: Binding, active: set[str]) -> None:
    for component, parameters in binding:
        for parameter in parameters:
            parameter.requires_grad_(component.name in active)


def assert_close(found: Tensor | None, expected: Tensor | None, scale: float, tolerance: float, where: str) -> None:
    if expected is None or not expected.any():
        assert found is None or not found.any(), where
        return
    assert found is not None, f"{where}: no gradient"
    assert (found - expected).norm().item() <= tolerance * scale, where


def compare(
    binding: Binding, expected: dict[str, tuple[Tensor | None, ...]], active: set[str], tolerance: float
) -> None:
    """Each active slice within tolerance of the reference, relative to the norm of its component's gradient."""
    for component, parameters in binding:
        scale = sum(float(g.norm()) ** 2 for g in expected[component.name] if g is not None) ** 0.5
        for parameter, part, gradient in zip(parameters, component.slices, expected[component.name], strict=True):
            where = f"{component.name}: {part.parameter} {part.start}:{part.stop} of {part.dim}"
            if component.name in active:
                assert_close(parameter.grad, gradient, scale, tolerance, where)
            else:
                assert parameter.grad is None, where


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_random_slices(name: str, dtype: torch.dtype) -> None:
    model, batch = prepared(name, dtype)
    partition = random_partition(model, seed=len(name))
    plain = copy.deepcopy(model)
    expected = reference_gradients(plain, partition, lambda m: seeded_loss(m, batch))
    plain_loss = seeded_loss(copy.deepcopy(model), batch)
    binding = bind(model, partition)
    rng = random.Random(0)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    for active in [set(partition.names), *({n for n in partition.names if rng.random() < 0.5} for _ in range(2))]:
        for buffer_name, buffer in model.named_buffers():
            buffer.copy_(buffers[buffer_name])
        model.zero_grad()
        activate(binding, active)
        loss = seeded_loss(model, batch)
        assert torch.equal(loss, plain_loss)
        if active:
            loss.backward()
        compare(binding, expected, active, TOLERANCE[dtype])
    binding.check()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "torch_transformer_encoder", "mixtral", "conv_net"])
def test_training_with_changing_active_sets(name: str) -> None:
    model, batch = prepared(name, torch.float64)
    partition = random_partition(model, seed=1)
    plain = copy.deepcopy(model)
    reference = ReferenceUpdate(plain, partition, lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1))
    binding = bind(model, partition)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters)} for _, parameters in binding], lr=1e-3, weight_decay=0.1
    )
    for step, active in enumerate([set(partition.names), {"part.0", "part.2"}, {"part.1"}, {"part.0", "part.3"}]):
        activate(binding, active)
        frozen = {n: [p.detach().clone() for p in binding.parameters[n]] for n in partition.names if n not in active}
        seeded_loss(model, batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(lambda m, step=step: seeded_loss(m, batch, step), active)
        for component_name, before in frozen.items():
            assert all(torch.equal(p, b) for p, b in zip(binding.parameters[component_name], before, strict=True))
    binding.restore()
    for (key, trained), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        # A step has the size lr whatever the gradient's: compare what was learnt, not the weights.
        assert (trained - expected).abs().max() <= 1e-9, key


def test_reference_gradients_are_autograds_own() -> None:
    """On a model small enough to differentiate by hand: L = Σ (W x)², dL/dW = 2 W x xᵀ."""
    model = nn.Linear(3, 4, bias=False)
    x = torch.randn(3)
    partition = random_partition(model, seed=0, whole=0.0)
    found = reference_gradients(model, partition, lambda m: m(x).square().sum())
    expected = 2.0 * torch.outer(model.weight.detach() @ x, x)
    for component in partition:
        for part, gradient in zip(component.slices, found[component.name], strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient, part.of(expected))
    assert model.weight.grad is None


def test_reference_update_scales_the_learning_rate_per_component() -> None:
    model = nn.Linear(3, 4, bias=False)
    x = torch.randn(5, 3)
    before = model.weight.detach().clone()
    partition: Partition = random_partition(model, seed=0, components=2, whole=0.0)
    update = ReferenceUpdate(model, partition, lambda groups: torch.optim.SGD(groups, lr=0.1))
    gradient = reference_gradients(model, partition, lambda m: m(x).square().mean())
    update.step(lambda m: m(x).square().mean(), {"part.0": 3.0})
    for component in partition:
        factor = {"part.0": 0.3, "part.1": 0.0}[component.name]
        for part, part_gradient in zip(component.slices, gradient[component.name], strict=True):
            torch.testing.assert_close(part.of(model.weight.detach()), part.of(before) - factor * part_gradient)
