"""Fused optimizers on column slices: as the masked reference trains, with nothing written where it should not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from rgft.errors import OptimizerError
from rgft.execution.binding import Binding
from rgft.execution.fused_kernels import FusedKernels
from rgft.execution.moments import MomentMode, Moments
from rgft.execution.reference import ReferenceUpdate
from rgft.execution.views import bind, check_optimizer
from tests.unit.execution.split_toy import HIDDEN, WIDTH, Block, activate, head_partition
from tests.unit.execution.test_assembled import CASES, run, split_in_two

#: From parameters and settings to an optimizer.
Make = Callable[..., Optimizer]

MAKERS: dict[str, Make] = {
    "adamw": lambda p, **kw: AdamW(p, lr=0.05, weight_decay=0.5, **kw),
    "adamw amsgrad": lambda p, **kw: AdamW(p, lr=0.05, weight_decay=0.5, amsgrad=True, **kw),
    "adam": lambda p, **kw: Adam(p, lr=0.05, weight_decay=0.1, **kw),
    "sgd": lambda p, **kw: SGD(p, lr=0.01, weight_decay=0.5, **kw),
    "sgd momentum": lambda p, **kw: SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.5, **kw),
    "adagrad": lambda p, **kw: Adagrad(p, lr=0.05, weight_decay=0.1, **kw),
}
HEADS = ("head.0", "head.1", "head.2")
#: Off, on, off, alone, together: `head.1` comes on for the first time when the others have moments.
SCRIPT = [("head.0", "head.2"), ("head.2",), (*HEADS, "rest"), ("head.0", "head.1"), ("head.1",), (*HEADS, "rest"), ()]
UNIT = {torch.float32: 2e-6, torch.float64: 1e-14}


def loss_of_step(step: int) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        weight = next(model.parameters())
        x = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        return model(x).square().sum()

    return loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def values(binding: Binding) -> dict[str, list[Tensor]]:
    return {name: [p.detach().clone() for p in parameters] for name, parameters in binding.parameters.items()}


def column_views(binding: Binding) -> list[nn.Parameter]:
    """The views of `Block` that own columns: they are the narrow ones along the hidden width."""
    return [parameters[-1] for name, parameters in binding.parameters.items() if name != "rest"]


def is_dense(tensor: Tensor, dim: int) -> bool:
    return tensor.movedim(dim, 0).is_contiguous()


def step(model: nn.Module, binding: Binding, optimizer: Optimizer, number: int, active: Collection[str]) -> None:
    activate(binding, *active)
    if active:
        loss_of_step(number)(model).backward()
    optimizer.step()


class Trained:
    """A bound block with a fused optimizer, and its reference."""

    def __init__(self, make: Make, layers: str = "linear", dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
        self.model, self.plain = Block(layers).to(dtype), Block(layers).to(dtype)
        self.binding = bind(self.model, head_partition(self.model))
        self.optimizer = make(list(self.model.parameters()), **({"fused": True} | kwargs))
        check_optimizer(self.optimizer, self.binding)
        self.kernels = FusedKernels(self.optimizer, self.binding)
        self.reference = ReferenceUpdate(
            self.plain, head_partition(self.plain), lambda groups: make(groups, foreach=False)
        )

    def step(self, number: int, active: Collection[str]) -> None:
        before = values(self.binding)
        step(self.model, self.binding, self.optimizer, number, active)
        self.reference.step(loss_of_step(number), active)
        after = values(self.binding)
        for name in before:
            same = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
            assert same == [name not in active] * len(same), (number, name)

    def check(self) -> None:
        self.binding.check()
        for name, expected in self.plain.state_dict().items():
            unit = UNIT[expected.dtype]
            torch.testing.assert_close(self.model.state_dict()[name], expected, rtol=unit, atol=unit)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("layers", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("maker", MAKERS)
def test_components_off_and_on_train_as_the_reference(maker: str, layers: str, dtype: torch.dtype) -> None:
    trained = Trained(MAKERS[maker], layers, dtype)
    for number, active in enumerate(SCRIPT):
        trained.step(number, [name for name in active if name in trained.binding.parameters])
        trained.check()


@pytest.mark.parametrize("case", [name for name, (_, _, dim) in CASES.items() if dim == 1])
def test_any_module_with_columns_trains_as_the_plain_one(case: str) -> None:
    make, name, dim = CASES[case]
    module = make()
    plain = copy.deepcopy(module)
    binding = split_in_two(module, name, dim)
    # A key's bias has no gradient but rounding, which a small eps would make a step of.
    optimizers = [AdamW(net.parameters(), lr=0.1, eps=0.1, weight_decay=0.5, fused=True) for net in (module, plain)]
    FusedKernels(optimizers[0], binding)
    views = [binding.parameters[f"part.{i}"][0] for i in range(2)]
    assert all(is_dense(view, dim) for view in views)
    for _ in range(3):
        for net, optimizer in zip((module, plain), optimizers, strict=True):
            run(net).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, expected in plain.state_dict().items():
            torch.testing.assert_close(module.state_dict()[key], expected, rtol=2e-6, atol=2e-6)
    first, second = (view.detach().clone() for view in views)
    views[1].requires_grad_(False)
    run(module).square().sum().backward()
    optimizers[0].step()
    assert torch.equal(views[1], second)
    assert not torch.equal(views[0], first)


def test_parameter_gradient_and_state_are_alike_in_memory() -> None:
    trained = Trained(MAKERS["adamw amsgrad"])
    trained.step(0, HEADS)
    columns = column_views(trained.binding)
    assert [view.stride() for view in columns] == [(1, WIDTH)] * 3
    for view in columns:
        state = trained.optimizer.state[view]
        moments = [state[key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
        assert view.grad is not None
        assert {t.stride() for t in (view.grad, *moments)} == {(1, WIDTH)}


def test_gradients_of_another_layout_are_taken_over() -> None:
    trained = Trained(MAKERS["adamw"])
    activate(trained.binding, *HEADS)
    loss_of_step(0)(trained.model).backward()
    for view in column_views(trained.binding):
        assert view.grad is not None
        view.grad = view.grad.contiguous()
        assert view.grad.stride() == (8, 1)
    trained.optimizer.step()
    trained.reference.step(loss_of_step(0), HEADS)
    trained.check()


def test_gradients_made_within_the_step() -> None:
    trained = Trained(MAKERS["adamw"])

    def closure() -> float:
        activate(trained.binding, *HEADS)
        loss = loss_of_step(0)(trained.model)
        loss.backward()
        return float(loss.detach())

    trained.optimizer.step(closure)
    trained.reference.step(loss_of_step(0), HEADS)
    trained.check()


def test_accumulation_and_clipping() -> None:
    trained = Trained(MAKERS["adamw"])
    active = ("head.0", "head.2", "rest")
    for number in range(3):
        activate(trained.binding, *active)
        for micro in range(2):
            (loss_of_step(2 * number + micro)(trained.model) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.model.parameters(), 0.5)
        assert norm > 0.5
        trained.optimizer.step()

        def clipped(net: nn.Module, number: int = number, scale: float = float(0.5 / (norm + 1e-6))) -> Tensor:
            return scale * (loss_of_step(2 * number)(net) + loss_of_step(2 * number + 1)(net)) / 2

        trained.reference.step(clipped, active)
    trained.check()


def test_without_fused_groups_nothing_is_touched() -> None:
    model, plain = Block(), Block()
    binding = bind(model, head_partition(model))
    fused = model.state_dict(keep_vars=True)["down.weight"]
    memory = fused.data_ptr()
    optimizers = [AdamW(net.parameters(), lr=0.1, foreach=False) for net in (model, plain)]
    FusedKernels(optimizers[0], binding)
    for net, optimizer in zip((model, plain), optimizers, strict=True):
        for number in range(3):
            optimizer.zero_grad()
            loss_of_step(number)(net).backward()
            optimizer.step()
    assert (fused.data_ptr(), fused.stride()) == (memory, (HIDDEN, 1))
    for name, expected in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected)


def test_switching_fused_on_later_takes_moments_along() -> None:
    trained = Trained(MAKERS["adamw"], fused=False, foreach=False)
    columns = column_views(trained.binding)
    trained.step(0, HEADS)
    assert [view.stride() for view in columns] == [(HIDDEN, 1)] * 3
    assert trained.optimizer.state[columns[0]]["exp_avg"].stride() == (8, 1)
    trained.optimizer.param_groups[0]["fused"] = True
    for number, active in enumerate(SCRIPT, start=1):
        trained.step(number, active)
        trained.check()
    assert [view.stride() for view in columns] == [(1, WIDTH)] * 3
    assert trained.optimizer.state[columns[0]]["exp_avg"].stride() == (1, WIDTH)
    trained.optimizer.param_groups[0]["fused"] = False  # and off again: nothing depends on the layout
    trained.step(20, HEADS)
    trained.check()


@pytest.mark.parametrize("fused_before", [False, True])
def test_loaded_moments_are_laid_out_as_their_slices(fused_before: bool) -> None:
    before = Trained(MAKERS["adamw"], **({} if fused_before else {"fused": False, "foreach": False}))
    for number in range(2):
        before.step(number, HEADS)
    saved = copy.deepcopy((before.model.state_dict(), before.optimizer.state_dict()))
    for group in saved[1]["param_groups"]:
        group["fused"] = True
    for state in saved[1]["state"].values():  # as a format that keeps values only would have it
        state.update({k: v.contiguous() for k, v in state.items()})
    after = Trained(MAKERS["adamw"])
    after.model.load_state_dict(saved[0])
    after.optimizer.load_state_dict(saved[1])
    for view in column_views(after.binding):
        state = after.optimizer.state[view]
        assert {state[key].stride() for key in ("exp_avg", "exp_avg_sq")} == {(1, WIDTH)}
    before.optimizer.param_groups[0].update(fused=True)
    for number in range(2, 5):
        for run_ in (before, after):
            step(run_.model, run_.binding, run_.optimizer, number, HEADS)
    for name, expected in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], expected, rtol=1e-6, atol=1e-7, msg=name)


def test_groups_that_are_fused_by_loading_are_prepared_before_the_next_forward() -> None:
    saved = Trained(MAKERS["adamw"])
    saved.step(0, HEADS)
    loaded = Trained(MAKERS["adamw"], fused=False, foreach=False)
    loaded.optimizer.load_state_dict(saved.optimizer.state_dict())
    assert loaded.optimizer.param_groups[0]["fused"]
    assert [view.stride() for view in column_views(loaded.binding)] == [(1, WIDTH)] * 3


@pytest.mark.parametrize("mode", ["keep", "decay", "reset", "offload"])
@pytest.mark.parametrize("maker", ["adamw", "sgd momentum"])
def test_moment_modes(maker: str, mode: MomentMode) -> None:
    ends = []
    for kernel in ({"fused": True}, {"foreach": False}):
        model = Block()
        binding = bind(model, head_partition(model))
        optimizer = MAKERS[maker](list(model.parameters()), **kernel)
        FusedKernels(optimizer, binding)
        moments = Moments(optimizer, binding, mode)
        on: set[str] = {*HEADS, "rest"}
        for number, active in enumerate([HEADS, ("head.0", "rest"), ("head.1",), HEADS, ("head.2", "rest"), HEADS]):
            moments.switch(turned_off=on - {*active}, turned_on={*active} - on, step=number)
            on = {*active}
            before = values(binding)
            step(model, binding, optimizer, number, active)
            after = values(binding)
            for name in before.keys() - on:
                assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
        for view in column_views(binding):
            state = [s for s in optimizer.state[view].values() if isinstance(s, Tensor) and s.dim()]
            assert state
            if "fused" in kernel:
                assert {s.stride() for s in state} == {(1, WIDTH)}
        ends.append(model.state_dict())
    for name, expected in ends[1].items():
        torch.testing.assert_close(ends[0][name], expected, rtol=2e-6, atol=2e-6)


def test_a_dampened_momentum_that_begins_late_is_torchs_error_and_moves_nothing() -> None:
    trained = Trained(lambda p, **kw: SGD(p, lr=0.1, momentum=0.9, dampening=0.5, **kw))
    trained.step(0, ("head.0",))
    before = weights(trained.model)
    with pytest.raises(TypeError, match="NoneType"):
        step(trained.model, trained.binding, trained.optimizer, 1, ("head.0", "head.1"))
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())


def test_a_gradient_in_the_making_is_of_the_weights_that_its_forward_saw() -> None:
    model, plain = Block(), Block()
    binding = bind(model, head_partition(model))
    losses = [loss_of_step(0)(net) for net in (model, plain)]
    FusedKernels(AdamW(model.parameters(), fused=True), binding)
    for loss in losses:
        loss.backward()
    for view, part in zip(column_views(binding), plain.down.weight.grad.split(8, dim=1), strict=True):  # type: ignore[union-attr, operator]
        assert torch.equal(view.grad, part)  # type: ignore[arg-type]


def test_a_change_between_forward_and_backward_is_noticed() -> None:
    trained = Trained(MAKERS["adamw"])
    trained.step(0, HEADS)
    loss = loss_of_step(1)(trained.model)
    with torch.no_grad():
        column_views(trained.binding)[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -------------------------------------------------------------------- what kernels are taken


@pytest.mark.parametrize("kind", [Adam, AdamW, SGD, Adagrad])
def test_torchs_fused_kernels_are_taken(kind: type[Optimizer]) -> None:
    model = Block()
    binding = bind(model, head_partition(model))
    check_optimizer(kind(model.parameters(), lr=0.1, fused=True), binding)  # type: ignore[call-arg]


def fused_of_another() -> tuple[Optimizer, Binding]:
    model = Block()
    binding = bind(model, head_partition(model))
    optimizer = torch.optim.RMSprop(model.parameters())
    optimizer.param_groups[0]["fused"] = True
    return optimizer, binding


def test_kernels_that_are_not_known_are_refused() -> None:
    optimizer, binding = fused_of_another()
    with pytest.raises(OptimizerError, match=r"RMSprop has fused=True for 9 slices(.|\n)*Pass fused=False"):
        check_optimizer(optimizer, binding)


def test_kernels_that_are_not_known_are_refused_when_switched_on_later_too() -> None:
    optimizer, binding = fused_of_another()
    optimizer.param_groups[0]["fused"] = False
    FusedKernels(optimizer, binding)
    optimizer.step()
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(OptimizerError, match="RMSprop has fused=True"):
        optimizer.step()


@pytest.mark.parametrize("where", ["apex.optimizers.fused_adam", "deepspeed.ops.adam"])
def test_kernels_of_other_packages_are_refused(where: str) -> None:
    model = Block()
    binding = bind(model, head_partition(model))
    kind = type("Adam", (torch.optim.Adam,), {"__module__": where})
    with pytest.raises(OptimizerError, match="writes through raw pointers"):
        check_optimizer(kind(model.parameters()), binding)


def test_detached_kernels_leave_the_optimizer_alone() -> None:
    trained = Trained(MAKERS["adamw"])
    trained.kernels.detach()
    assert not trained.optimizer._optimizer_step_pre_hooks
    assert not trained.optimizer._optimizer_load_state_dict_post_hooks
