from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from rgft.cost.elements import FRESH_BYTES, Elements, count_elements


def written(work: Callable[[], object]) -> float:
    found = count_elements(work)
    assert found.drawn == found.fresh == 0
    return found.written


def test_forward_and_backward_by_hand() -> None:
    x, w = torch.randn(40, 50), torch.randn(50, 60, requires_grad=True)
    # gelu, its sum and the seed of its gradient, the gradient of gelu; neither products nor the spread-out seed.
    assert written(lambda: F.gelu(x @ w).sum().backward()) == 2400 + 1 + 1 + 2400


def test_narrow_products_count_with_what_they_read_and_write() -> None:
    x, a, bias = torch.randn(40, 50), torch.randn(50, 8), torch.zeros(8)
    assert written(lambda: x @ a) == 40 * 50 + 50 * 8 + 40 * 8
    assert written(lambda: x.t() @ x) == 0
    assert written(lambda: F.linear(x, a.t(), bias)) == 40 * 50 + 50 * 8 + 40 * 8
    many, others = torch.randn(3, 4, 50), torch.randn(3, 50, 60)
    assert written(lambda: many @ others) == 3 * (4 * 50 + 50 * 60 + 4 * 60)
    image, kernel = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert written(lambda: F.conv2d(image, kernel)) == 0


def test_views_write_nothing_and_work_in_place_does() -> None:
    x = torch.zeros(4, 6)
    assert written(lambda: x.t()[1:].reshape(5, 4).unsqueeze(0)) == 0
    assert written(lambda: x.t().reshape(24)) == 24  # a copy
    assert written(lambda: x.add_(1.0)) == 24
    assert written(lambda: x[:2].mul_(2.0)) == 12


def test_memory_that_is_only_reserved_is_not_written() -> None:
    x = torch.randn(4, 6)
    assert written(lambda: (torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 2), (1, 2)))) == 0
    assert written(lambda: torch.empty_like(x).zero_()) == 24


def test_the_optimizers_lists_are_counted_by_parameter_elsewhere() -> None:
    parameters = [nn.Parameter(torch.randn(100)), nn.Parameter(torch.randn(50))]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert written(optimizer.step) == 0


def test_a_table_s_gradient_is_as_large_as_the_table() -> None:
    table, ids = nn.Embedding(1000, 4), torch.tensor([1, 2, 2])
    assert written(lambda: table(ids).sum().backward()) >= 4000


def test_random_numbers_stand_apart() -> None:
    x = torch.randn(10, 20, requires_grad=True)
    found = count_elements(lambda: F.dropout(x, 0.5, training=True).sum().backward())
    assert found.drawn == 200
    assert count_elements(lambda: F.dropout(x, 0.5, training=False)) == Elements()


def test_large_tensors_stand_apart_wherever_they_come_from() -> None:
    rows = FRESH_BYTES // 4 // 1000 + 1
    with torch.device("meta"):
        x, w = torch.ones(rows, 8), torch.ones(8, 1000)
        wide, table, ids = torch.ones(rows, 1000), nn.Embedding(rows, 1000), torch.zeros(2, dtype=torch.long)
    assert count_elements(lambda: x @ w) == Elements(written=rows * 8 + 8 * 1000, fresh=rows * 1000)
    assert count_elements(lambda: wide + 1.0) == Elements(fresh=rows * 1000)
    assert count_elements(lambda: wide.t()) == Elements()
    assert count_elements(lambda: wide.add_(1.0)) == Elements(written=rows * 1000)  # its memory is there
    assert count_elements(lambda: table(ids).sum().backward()).fresh == rows * 1000
    assert count_elements(lambda: wide[:-1] + 1.0) == Elements(written=(rows - 1) * 1000)


def test_sums_and_multiples() -> None:
    one = Elements(written=3, drawn=2, fresh=1)
    assert one * 2 + Elements(written=1) == Elements(written=7, drawn=4, fresh=2)


def test_attention_counts_with_what_it_writes() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert written(lambda: F.scaled_dot_product_attention(q, q, q)) == 64 + 16  # and the logarithm of each row's sum
