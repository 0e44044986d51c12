import copy

import pytest
import torch

from rgft.blocks import RowSample
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


@pytest.mark.parametrize("name", ["rmsprop", "nesterov", "adafactor"])
def test_optimizers_whose_state_does_not_tell_step_a_copy(name: str) -> None:
    kinds = {
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    }
    model = Toy().double().eval()
    optimizer = kinds[name](model.parameters())
    directions = Directions(optimizer)
    for seed in range(3):
        optimizer.param_groups[0]["weight_decay"] = 0.0  # the step without decay is what is told
        directions.keep_next(1, (0,))
        made = step(model, optimizer, seed)
        for delta, parameter in zip(made, model.parameters(), strict=True):
            last = directions.last(parameter)
            assert last is not None
            assert torch.allclose(delta, -last, atol=1e-9)
        optimizer.param_groups[0]["weight_decay"] = 0.1
        step(model, optimizer, seed + 10)
        assert directions.last(model.head.weight) is None  # nothing was kept of this one
    directions.detach()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.RMSprop], ids=["whole", "by row"])
def test_kept_rows_are_rows_of_the_whole_step(kind: type[torch.optim.Optimizer]) -> None:
    """In blocks as a sample gives them, as single rows of a table, and of small parameters whole."""
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.nn.Parameter(torch.randn(rows, 64, generator=generator)) for rows in (1100, 5))
    for stride, turns in ((1, (0,)), (4, (6, 7))):
        optimizer = kind([large, small], lr=0.01)
        directions = Directions(optimizer)
        for parameter in (large, small):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        whole = {p: directions.would_make(p, p.grad) for p in (large, small)}
        directions.keep_next(stride, turns)
        optimizer.step()
        for turn in turns:
            sample = RowSample(stride=stride, turn=turn)
            for parameter, step in whole.items():
                of = sample.factor(parameter)
                table = torch.tensor([turn % of, turn % of + 4 * of])[: 2 if parameter is large else 1]
                for rows in [*sample.blocks(parameter), table]:
                    last = directions.last(parameter, 2.0, rows, stride=of)
                    assert last is not None
                    assert torch.allclose(last, 2.0 * step[rows], rtol=1e-4, atol=1e-4)
        if stride > 1:
            other = next(iter(RowSample(stride=stride, turn=turns[0] + 2).blocks(large)))
            assert directions.last(large, 1.0, other, stride=stride) is None


def test_steps_that_fail_alone_are_refused_at_once() -> None:
    class Together(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise RuntimeError("wants all of them")

    with pytest.raises(
        OptimizerError, match="Together would make of each parameter, and a step of one parameter fails"
    ):
        Directions(Together(Toy().parameters(), lr=0.1))
