import copy

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from rgft.execution.multipliers import Multipliers
from tests.unit.execution.toy import Toy, toy_batch, toy_binding

SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda s: 1 / (1 + s)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=7),
    "exponential": lambda o: ExponentialLR(o, gamma=0.8),
    "one_cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
}


def train(model: Toy, optimizer: torch.optim.Optimizer, scheduler: object, steps: int = 6) -> list[float]:
    rates = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(toy_batch(step)).square().mean().backward()
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))  # type: ignore[attr-defined]
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_never_see_a_multiplied_rate(name: str) -> None:
    model = Toy()
    plain = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    multipliers = Multipliers(optimizer, toy_binding(model))
    multipliers.set({"layers.0": 3.0, "head": 0.5})
    assert train(model, optimizer, SCHEDULERS[name](optimizer)) == train(Toy(), plain, SCHEDULERS[name](plain))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_multiplier_is_a_learning_rate_of_its_own(optimizer_class: type[torch.optim.Optimizer]) -> None:
    factors = {"layers.0": 3.0, "layers.2": 3.0, "head": 0.25}
    model, expected = Toy(), Toy()
    optimizer = optimizer_class(model.parameters(), lr=0.01, weight_decay=0.1)  # type: ignore[call-arg]
    Multipliers(optimizer, toy_binding(model)).set(factors)
    groups = [
        {"params": list(parameters), "lr": 0.01 * factors.get(component.name, 1.0)}
        for component, parameters in toy_binding(expected)
    ]
    oracle = optimizer_class(groups, lr=0.01, weight_decay=0.1)  # type: ignore[call-arg]
    for step in range(4):
        for m, o in ((model, optimizer), (expected, oracle)):
            torch.manual_seed(step)
            o.zero_grad()
            m(toy_batch(step)).square().mean().backward()
            o.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_multiplier_one_leaves_the_groups_alone_and_equal_ones_share_a_group() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    multipliers, groups = Multipliers(optimizer, toy_binding(model)), optimizer.param_groups
    inside: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, a, k: inside.append([g["lr"] for g in o.param_groups]))
    model(toy_batch()).sum().backward()
    for factors in ({}, {"head": 1.0}, {"layers.0": 2.0, "layers.1": 2.0}):
        multipliers.set(factors)
        optimizer.step()
        assert optimizer.param_groups is groups
    assert inside == [[0.01], [0.01], [0.01, 0.02]]


def test_groups_come_back_after_a_step_that_raised() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    multipliers = Multipliers(optimizer, toy_binding(model))
    multipliers.set({"head": 2.0})

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    multipliers.restore(optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01]
    assert len(optimizer.param_groups[0]["params"]) == 15


def test_off_is_bit_unchanged_under_decay_and_momentum() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    Multipliers(optimizer, toy_binding(model)).set({"layers.1": 2.0})
    for step in range(6):
        if step == 3:
            frozen = copy.deepcopy(model.layers[0].state_dict())
            model.layers[0].requires_grad_(False)
        optimizer.zero_grad()
        model(toy_batch(step)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in model.layers[0].state_dict().items())


def test_groups_that_change_between_steps_are_split_anew() -> None:
    model = Toy()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([parameters[0]], lr=0.1)
    multipliers = Multipliers(optimizer, toy_binding(model))
    seen: list[dict[int, float]] = []
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append({id(p): g["lr"] for g in o.param_groups for p in g["params"]})
    )
    every = {component.name: 2.0 for component, _ in toy_binding(model)}
    multipliers.set(every)
    optimizer.step()
    assert seen[-1] == {id(parameters[0]): 0.2}
    optimizer.param_groups[0]["params"].append(parameters[1])
    optimizer.step()
    assert seen[-1] == {id(p): 0.2 for p in parameters[:2]}
    optimizer.param_groups[0]["params"] = [parameters[2], parameters[1]]
    optimizer.step()
    assert seen[-1] == {id(p): 0.2 for p in parameters[1:3]}
    every[next(iter(every))] = 4.0  # the caller's own dictionary, changed and given again
    multipliers.set(every)
    optimizer.add_param_group({"params": [parameters[0]], "lr": 1.0})
    optimizer.step()
    assert seen[-1][id(parameters[0])] == 4.0
    multipliers.set({})
    optimizer.step()
    assert seen[-1] == {id(parameters[0]): 1.0, **{id(p): 0.1 for p in parameters[1:3]}}
