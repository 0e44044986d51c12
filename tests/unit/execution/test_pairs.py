"""The products of pairs, against one pair after the other."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from rgft.components import ParameterSlice
from rgft.execution.linear import ROWS_IN, ROWS_OUT, Layout
from rgft.execution.pairs import CHILD, LowRankPairs, attach

INPUTS, OUTPUTS, RANK, SCALE = 12, 20, 3, 0.5


def drawn(layout: Layout, dim: int | None, cuts: list[int], seed: int = 0) -> LowRankPairs:
    """Pairs of the slices between `cuts`, registered in any order, with values that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    pairs = LowRankPairs(layout, dim, SCALE)
    shape = (OUTPUTS, INPUTS) if layout is ROWS_OUT else (INPUTS, OUTPUTS)
    spans = list(itertools.pairwise(cuts)) if dim is not None else [(0, 0)]
    random.Random(seed).shuffle(spans)
    for index, (start, stop) in enumerate(spans):
        size = stop - start
        inputs = size if dim is not None and dim != layout.output_dim else INPUTS
        outputs = size if dim == layout.output_dim else OUTPUTS
        a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((RANK, inputs), (outputs, RANK)))
        pairs.add(f"p{index}", ParameterSlice(parameter="w", shape=shape, dim=dim, start=start, stop=stop), a, b)
    return pairs


def one_by_one(pairs: LowRankPairs, x: Tensor, y: Tensor) -> Tensor:
    for place, (start, stop) in enumerate(pairs.spans):
        if not pairs.is_running[place]:
            continue
        a, b = pairs.pair(place)
        if pairs.dim is None:
            y = y + SCALE * (x @ a.t() @ b.t())
        elif pairs.dim == pairs.layout.output_dim:
            y = y + nn.functional.pad(SCALE * (x @ a.t() @ b.t()), (start, OUTPUTS - stop))
        else:
            y = y + SCALE * (x[..., start:stop] @ a.t() @ b.t())
    return y


@pytest.mark.parametrize("layout", [ROWS_OUT, ROWS_IN], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("even", [True, False])
def test_any_pairs_together_are_each_by_itself(layout: Layout, dim: int | None, even: bool) -> None:
    """Whatever runs, and whatever of it is trained: outputs, gradients, and no gradient of what is not trained."""
    size = (OUTPUTS, INPUTS) if layout is ROWS_OUT else (INPUTS, OUTPUTS)
    whole = size[dim or 0]
    cuts = list(range(0, whole + 1, 4)) if even else [0, 1, 5, 7, whole]
    pairs = drawn(layout, dim, cuts)
    draw = random.Random(1)
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    y = torch.randn(2, 5, OUTPUTS, dtype=torch.float64)
    for _ in range(12):
        for place in range(len(pairs.spans)):
            pairs.is_running[place] = draw.random() < 0.7
            trained = draw.random() < 0.6
            for parameter in pairs.pair(place):
                parameter.requires_grad_(trained)
        results = []
        for compute in (pairs.added, lambda x, y: one_by_one(pairs, x, y)):
            x_leaf, y_leaf = x.clone().requires_grad_(), y.clone().requires_grad_()
            out = compute(x_leaf, y_leaf)
            (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()).sum().backward()
            results.append([out.detach(), x_leaf.grad, y_leaf.grad, *(p.grad for p in pairs.parameters())])
            pairs.zero_grad()
        for found, expected in zip(*results, strict=True):
            assert (found is None) is (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_computes_the_same(dim: int | None, dtype: torch.dtype) -> None:
    linear = nn.Linear(INPUTS, OUTPUTS).to(dtype)
    pairs = drawn(ROWS_OUT, dim, [0, 4, 8, (OUTPUTS, INPUTS)[dim or 0]]).float()
    weight = linear.weight.detach().clone()
    attach(linear, pairs)
    x = torch.randn(3, INPUTS).to(dtype)
    assert torch.equal(linear.state_dict()["weight"], weight)
    assert list(linear.state_dict()) == ["weight", "bias"]
    pairs.is_running = [True] * len(pairs.spans)
    saved = linear.state_dict()
    assert linear.state_dict(keep_vars=True)["weight"] is linear.weight
    plain = nn.Linear(INPUTS, OUTPUTS).to(dtype)
    plain.load_state_dict(saved)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(plain(x), linear(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(linear.weight, weight)
    twin = copy.deepcopy(linear)
    pairs.forget()
    assert not torch.equal(twin(x), linear(x))
    assert torch.equal(linear(x), nn.functional.linear(x, weight, linear.bias))
    twin.load_state_dict(saved)  # the twin's own pairs give way
    assert torch.equal(twin(x), plain(x))
    assert CHILD in twin._modules


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_with_b_zero_changes_no_bit(dim: int | None, autocast: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(INPUTS, OUTPUTS).to(dtype)
    x = torch.randn(4, 7, INPUTS).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = linear(x)
        pairs = drawn(ROWS_OUT, dim, [0, 4, 8, (OUTPUTS, INPUTS)[dim or 0]]).float()
        pairs.forget()
        pairs.is_running = [True] * len(pairs.spans)
        attach(linear, pairs)
        found = linear(x)
        assert found.dtype is expected.dtype
        assert torch.equal(found, expected)
        found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in pairs.parameters())
