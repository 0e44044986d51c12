import torch
from torch import nn

from rgft.cost.memory import step_memory


def test_every_byte_of_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(5, 8)

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = step_memory(model, optimizer, step)
    trained = 16 + 16 * 4 + 4
    assert found.weights == 4 * (8 * 16 + trained)
    assert found.gradients == 4 * trained
    assert found.moments == 4 * (2 * trained + 3)  # two moments, and a step count for each of three parameters
    # Of the frozen first weight autograd saves nothing; the output of tanh serves tanh and the second layer.
    assert found.activations == 4 * 5 * 16
    assert found.to_dict()["total"] == found.weights + found.gradients + found.moments + found.activations


def test_hooks_are_gone_afterwards() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert step_memory(model, optimizer, step).moments == 0
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
