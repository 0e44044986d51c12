import copy

import pytest
import torch

from rgft.errors import OptimizerError
from rgft.execution.directions import Directions
from tests.unit.execution.toy import Toy, toy_batch

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


def step(model: Toy, optimizer: torch.optim.Optimizer, seed: int) -> list[torch.Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(toy_batch(seed)).square().mean().backward()
    optimizer.step()
    return [(p.detach() - b) / 0.01 for p, b in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_directions_are_the_steps_that_were_and_would_be_made(name: str) -> None:
    model = Toy().double().eval()
    optimizer = OPTIMIZERS[name](model.parameters())
    directions = Directions(optimizer)
    for seed in range(3):
        twin = copy.deepcopy(model)
        twin(toy_batch(seed)).square().mean().backward()
        predicted = [
            directions.would_make(p, q.grad)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True)
            if q.grad is not None
        ]
        made = step(model, optimizer, seed)
        for delta, direction in zip(made, predicted, strict=True):
            assert direction is not None
            assert torch.allclose(delta, -direction, atol=1e-9)
        if name in ("adamw", "momentum"):
            for delta, parameter in zip(made, model.parameters(), strict=True):
                last = directions.last(parameter)
                assert last is not None
                assert torch.allclose(delta, -last, atol=1e-9)


def test_would_make_changes_no_state() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    Directions(optimizer).would_make(model.head.weight, torch.ones_like(model.head.weight))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], before[i][k]) for i in before for k in before[i])


def test_unknown_optimizer() -> None:
    with pytest.raises(OptimizerError, match="RMSprop"):
        Directions(torch.optim.RMSprop(Toy().parameters()))
