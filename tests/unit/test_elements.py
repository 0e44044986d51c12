import torch
import torch.nn.functional as F
from torch import nn

from rgft.cost.elements import count_elements


def test_forward_and_backward_by_hand() -> None:
    x, w = torch.randn(10, 20), torch.randn(20, 30, requires_grad=True)
    # gelu, its sum and the seed of its gradient, the gradient of gelu; neither products nor the spread-out seed.
    assert count_elements(lambda: F.gelu(x @ w).sum().backward()) == 300 + 1 + 1 + 300


def test_views_write_nothing_and_work_in_place_does() -> None:
    x = torch.zeros(4, 6)
    assert count_elements(lambda: x.t()[1:].reshape(5, 4).unsqueeze(0)) == 0
    assert count_elements(lambda: x.t().reshape(24)) == 24  # a copy
    assert count_elements(lambda: x.add_(1.0)) == 24
    assert count_elements(lambda: x[:2].mul_(2.0)) == 12


def test_the_optimizers_lists_are_counted_by_parameter_elsewhere() -> None:
    parameters = [nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(50))]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert count_elements(optimizer.step) == 0


def test_a_table_s_gradient_is_as_large_as_the_table() -> None:
    table, ids = nn.Embedding(1000, 4), torch.tensor([1, 2, 2])
    assert count_elements(lambda: table(ids).sum().backward()) >= 4000
