import pytest
import torch

from rgft.execution.moments import MomentMode, Moments
from tests.unit.execution.toy import Toy, toy_batch, toy_binding


def after_two_steps(
    mode: MomentMode, optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: object
):
    model = Toy()
    binding = toy_binding(model)
    optimizer = optimizer_class(model.parameters(), lr=0.01, **kwargs)  # type: ignore[arg-type]
    for step in range(2):
        optimizer.zero_grad()
        model(toy_batch(step)).square().mean().backward()
        optimizer.step()
    return model, optimizer, Moments(optimizer, binding, mode)


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}


@pytest.mark.parametrize("mode", ["keep", "offload"])
def test_state_is_the_same_after_being_off(mode: MomentMode) -> None:
    model, optimizer, moments = after_two_steps(mode)
    weight = model.layers[0].linear.weight
    before = copied(optimizer.state[weight])
    moments.switch(turned_off=["layers.0"], turned_on=[], step=2)
    moments.switch(turned_off=[], turned_on=["layers.0"], step=9)
    assert all(torch.equal(optimizer.state[weight][key], value) for key, value in before.items())


def test_reset_drops_the_state_of_that_component_only() -> None:
    model, optimizer, moments = after_two_steps("reset")
    moments.switch(turned_off=["layers.0"], turned_on=[], step=2)
    assert model.layers[0].linear.weight not in optimizer.state
    assert model.layers[1].linear.weight in optimizer.state


def test_decay_equals_zero_gradients_meanwhile() -> None:
    model, optimizer, moments = after_two_steps("decay")
    weight = model.layers[0].linear.weight
    before = copied(optimizer.state[weight])
    moments.switch(turned_off=["layers.0"], turned_on=[], step=2)
    moments.switch(turned_off=[], turned_on=["layers.0"], step=5)
    first, second = before["exp_avg"], before["exp_avg_sq"]
    for _ in range(3):
        first, second = 0.9 * first, 0.999 * second
    assert torch.allclose(optimizer.state[weight]["exp_avg"], first, rtol=1e-6)
    assert torch.allclose(optimizer.state[weight]["exp_avg_sq"], second, rtol=1e-6)
    assert optimizer.state[weight]["step"] == before["step"]


def test_decay_of_momentum() -> None:
    model, optimizer, moments = after_two_steps("decay", torch.optim.SGD, momentum=0.8)
    weight = model.layers[0].linear.weight
    before = optimizer.state[weight]["momentum_buffer"].clone()
    moments.switch(turned_off=["layers.0"], turned_on=[], step=2)
    resumed = Moments(optimizer, toy_binding(model), "decay")
    resumed.load_state_dict(moments.state_dict())
    resumed.switch(turned_off=[], turned_on=["layers.0"], step=4)
    assert torch.allclose(optimizer.state[weight]["momentum_buffer"], 0.64 * before)
