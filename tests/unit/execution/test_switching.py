import pytest
import torch
from torch import nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding
from rgft.execution.probing import still
from rgft.execution.switching import Switch
from rgft.plan import UpdatePlan
from tests.unit.execution.toy import Toy, toy_batch, toy_binding


def plan(on: set[str], *, cut: int, step: int = 0, **periods: int) -> UpdatePlan:
    names = ("embed", "layers.0", "layers.1", "layers.2", "head")
    return UpdatePlan(step=step, multipliers={n: float(n in on) for n in names}, cut=cut, periods=periods)


def test_off_gets_no_gradient_and_the_graph_stops_at_the_cut() -> None:
    model = Toy()
    switch = Switch(model, toy_binding(model))
    switch.apply(plan({"layers.2", "head"}, cut=3), 0)
    seen: list[bool] = []
    model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model(toy_batch()).sum().backward()
    assert seen == [False]
    assert {n.split(".weight")[0] for n, p in model.named_parameters() if p.grad is not None and "weight" in n} == {
        "layers.2.linear", "layers.2.norm", "head",
    }  # fmt: skip


def test_the_prefix_is_deterministic_and_what_lies_above_is_not() -> None:
    model = Toy().train()
    switch = Switch(model, toy_binding(model))
    switch.apply(plan({"layers.2", "head"}, cut=3), 0)
    states: list[torch.Tensor] = []
    model.layers[1].register_forward_hook(lambda m, a, out: states.append(out))
    outputs = [model(toy_batch()) for _ in range(2)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(outputs[0], outputs[1])
    assert all(m.training for m in model.modules())


def test_a_stack_that_is_frozen_as_a_whole_is_deterministic_too() -> None:
    model = Toy().train()
    Switch(model, toy_binding(model)).apply(plan({"head"}, cut=4), 0)
    assert torch.equal(model(toy_batch()), model(toy_batch()))


def test_training_mode_returns_even_when_the_forward_raises() -> None:
    model = Toy().train()
    switch = Switch(model, toy_binding(model))
    switch.apply(plan({"head"}, cut=4), 0)
    with pytest.raises(RuntimeError):
        model.layers[0](torch.ones(2, 3))  # wrong width
    assert all(m.training for m in model.modules())


def test_an_input_that_requires_gradients_does_not_undo_the_truncation() -> None:
    model = Toy()
    switch = Switch(model, toy_binding(model))
    model.embed.register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    switch.apply(plan({"layers.1", "layers.2", "head"}, cut=2), 0)
    seen: list[bool] = []
    model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model(toy_batch()).sum().backward()
    assert seen == [False]


def test_a_probe_looks_through_the_cut() -> None:
    model = Toy()
    binding = toy_binding(model)
    Switch(model, binding).apply(plan({"head"}, cut=4), 0)
    with still(model, binding):
        model(toy_batch()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_periods_switch_within_a_plan() -> None:
    model = Toy()
    switch = Switch(model, toy_binding(model))
    periodic = plan({"layers.2", "head"}, cut=3, step=4, **{"layers.2": 2})
    active = []
    for step in range(4, 8):
        switch.apply(periodic, step)
        active.append("layers.2" in switch.active)
    assert active == [True, False, True, False]


def test_turning_off_drops_a_gradient_that_would_still_be_stepped() -> None:
    model = Toy()
    switch = Switch(model, toy_binding(model))
    switch.apply(plan({"embed", "layers.0", "layers.1", "layers.2", "head"}, cut=0), 0)
    model(toy_batch()).sum().backward()
    switch.apply(plan({"head"}, cut=4), 1)
    assert model.embed.weight.grad is None
    assert model.head.weight.grad is not None


def test_batch_norm_of_an_off_component_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    parameters = dict(model.named_parameters())

    def component(name: str, depth: int) -> Component:
        slices = tuple(
            ParameterSlice(parameter=n, shape=tuple(p.shape)) for n, p in parameters.items() if n.startswith(f"{name}.")
        )
        return Component(name=name, kind="layer", slices=slices, depth=depth)

    partition = Partition(components=tuple(component(str(i), i) for i in range(4)), layers=(), granularity="layer")
    binding = Binding(
        partition=partition, parameters={c.name: tuple(parameters[s.parameter] for s in c.slices) for c in partition},
        names={}, restore=lambda: None, check=lambda: None,
    )  # fmt: skip
    switch = Switch(model, binding)
    switch.apply(UpdatePlan(step=0, multipliers={"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}), 0)
    before = [model[i].running_mean.clone() for i in (1, 3)]
    model(torch.randn(8, 3)).sum().backward()
    assert not torch.equal(model[1].running_mean, before[0])
    assert torch.equal(model[3].running_mean, before[1])


def test_detach_restores_flags_and_hooks() -> None:
    model = Toy()
    model.embed.weight.requires_grad_(False)
    switch = Switch(model, toy_binding(model))
    switch.apply(plan({"head"}, cut=4), 0)
    switch.detach()
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 14]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
