from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import OptimizerError, RGFTWarning
from rgft.execution.binding import Binding
from rgft.execution.optimizers import ELEMENTWISE, check_optimizer
from rgft.execution.views import bind
from tests.unit.execution.split_toy import Block, head_partition


def bound() -> tuple[Block, Binding]:
    model = Block()
    return model, bind(model, head_partition(model))


def named(name: str, base: type[Optimizer] = Optimizer) -> type[Optimizer]:
    """An optimizer class of that name, with the step of another."""

    def __init__(self: Any, params: Iterable[nn.Parameter]) -> None:
        Optimizer.__init__(self, params, {"lr": 0.1})

    return type(name, (base,), {"__init__": __init__, "__module__": "somewhere"})


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_optimizers_pass_and_train_views_as_wholes(kind: type[Optimizer]) -> None:
    model, binding = bound()
    plain = Block()
    optimizers = [kind(net.parameters(), lr=0.01, foreach=False) for net in (model, plain)]  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(optimizers[0], binding)
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_fused_kernels_on_row_views_pass_and_leave_neighbours_alone() -> None:
    model = nn.Linear(4, 6, bias=False)
    parts = [ParameterSlice(parameter="weight", shape=(6, 4), dim=0, start=a, stop=a + 3) for a in (0, 3)]
    components = tuple(Component(name=f"h.{i}", kind="head", depth=1, slices=(p,)) for i, p in enumerate(parts))
    binding = bind(model, Partition(components=components, layers=(), granularity="custom"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, lr=0.1)
    check_optimizer(optimizer, binding)
    before = model.weight.detach().clone()
    binding.parameters["h.1"][0].requires_grad_(False)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight[3:], before[3:])
    assert not torch.equal(model.weight[:3], before[:3])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AdamW8bit", "blocks"), ("PagedAdamW32bit", "pointers"), ("Adafactor", "per row"), ("Muon", "as a matrix"),
        ("GaLoreAdamW", "whole matrix"), ("SOAP", "as a matrix"), ("Lamb", "norm of the whole"),
        ("LBFGS", "line search"), ("LOMO", "outside of"),
    ],
)  # fmt: skip
def test_optimizers_that_see_more_than_the_element_are_refused(name: str, reason: str) -> None:
    model, binding = bound()
    for kind in (named(name), type(f"My{name}", (named(name),), {})):
        with pytest.raises(OptimizerError, match=rf"{reason}(.|\n)*granularity='layer'"):
            check_optimizer(kind(model.parameters()), binding)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon])
def test_torchs_own_that_are_refused(kind: type[Optimizer]) -> None:
    model, binding = bound()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(OptimizerError, match="changes meaning on slices"):
        check_optimizer(kind(matrices), binding)  # type: ignore[call-arg]


def test_a_bitsandbytes_module_is_known_by_its_package() -> None:
    model, binding = bound()
    kind = named("AdamW")
    kind.__module__ = "bitsandbytes.optim.adamw"
    with pytest.raises(OptimizerError, match="raw pointers"):
        check_optimizer(kind(model.parameters()), binding)  # type: ignore[call-arg]


def test_whole_parameters_go_with_everything() -> None:
    model = nn.Linear(3, 4)
    parts = tuple(ParameterSlice(parameter=n, shape=tuple(p.shape)) for n, p in model.named_parameters())
    layer = Component(name="layer", kind="layer", depth=1, slices=parts)
    binding = bind(model, Partition(components=(layer,), layers=(), granularity="layer"))
    check_optimizer(torch.optim.AdamW(model.parameters(), fused=True), binding)
    check_optimizer(named("Adafactor")(model.parameters()), binding)  # type: ignore[call-arg]


def test_one_that_computes_the_loss_again_in_its_step_is_refused() -> None:
    model = Block()
    binding = bind(model, Partition(components=(), layers=(), granularity="layer"))
    with pytest.raises(OptimizerError, match=r"needs no closure, found LBFGS.*use torch's AdamW"):
        check_optimizer(torch.optim.LBFGS(model.parameters()), binding)


def test_an_optimizer_made_before_attaching_is_refused() -> None:
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters())
    binding = bind(model, head_partition(model))
    with pytest.raises(OptimizerError, match=r"3 weights whole.*Make it afterwards"):
        check_optimizer(optimizer, binding)


def test_unknown_optimizers_warn() -> None:
    model, binding = bound()
    with pytest.warns(RGFTWarning, match="Novelty is not known to be elementwise"):
        check_optimizer(named("Novelty")(model.parameters()), binding)  # type: ignore[call-arg]


def test_wrapped_optimizers_are_looked_into() -> None:
    model, binding = bound()

    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    check_optimizer(Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)), binding)
    with pytest.raises(OptimizerError, match="Adafactor keeps one statistic"):
        check_optimizer(Wrapper(torch.optim.Adafactor(model.parameters())), binding)


def test_all_problems_are_reported_together() -> None:
    model = Block()
    early = list(model.parameters())
    binding = bind(model, head_partition(model))
    optimizer = named("Adafactor")([*early, *model.parameters()][:-1])  # type: ignore[call-arg]
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(OptimizerError, match=r"Make it afterwards(.|\n)*fused=False(.|\n)*per row"):
        check_optimizer(optimizer, binding)
