"""Cross-entropy behind a linear layer, chunk by chunk, against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from rgft.execution.chunked_loss import chunked_cross_entropy
from rgft.nested import tensors_in
from rgft.telemetry.flop_counter import count_flops

N, H, V = 23, 8, 50
Inputs = dict[str, Tensor]


def inputs(*, dtype: torch.dtype = torch.float64, positions: int = N, bias: bool = True, trains: str = "xwb") -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(name: str, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(name in trains)

    found = {"x": normal("x", positions, H), "w": normal("w", V, H)}
    if bias:
        found["b"] = normal("b", V)
    return found


def targets(positions: int = N) -> Tensor:
    return torch.randint(V, (positions,), generator=torch.Generator().manual_seed(1))


def plain(given: Inputs, labels: Tensor) -> Tensor:
    logits = functional.linear(given["x"], given["w"], given.get("b"))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(logits, labels, reduction="none")


def chunked(given: Inputs, labels: Tensor, chunk: int = 7) -> Tensor:
    return chunked_cross_entropy(given["x"], given["w"], given.get("b"), labels, positions=chunk)


def gradients(losses: Tensor, weights: Tensor, given: Inputs) -> dict[str, Tensor]:
    names = [name for name, value in given.items() if value.requires_grad]
    return dict(zip(names, torch.autograd.grad((losses * weights).sum(), [given[n] for n in names]), strict=True))


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype
    return float(torch.linalg.vector_norm((found - expected).double()) / torch.linalg.vector_norm(expected.double()))


EQUAL = torch.full((N,), 0.3, dtype=torch.float64)
UNEQUAL = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("chunk", [1, 7, 22, 23, 24, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", ["xwb", "x", "w", "xb"])
def test_losses_and_gradients_are_the_plain_ones(weights: Tensor, chunk: int, bias: bool, trains: str) -> None:
    given, labels = inputs(bias=bias, trains=trains), targets()
    expected, found = plain(given, labels), chunked(given, labels, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    wanted, actual = gradients(expected, weights, given), gradients(found, weights, given)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert distance(actual[name], wanted[name]) < 1e-12


def test_in_fp32() -> None:
    given, labels = inputs(dtype=torch.float32), targets()
    expected, found = plain(given, labels), chunked(given, labels)
    torch.testing.assert_close(found, expected)
    for weights in (EQUAL.float(), UNEQUAL.float()):
        wanted, actual = (
            gradients(losses, weights, given) for losses in (plain(given, labels), chunked(given, labels))
        )
        assert max(distance(actual[name], wanted[name]) for name in wanted) < 1e-5


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_under_autocast_products_are_those_of_its_type(weights: Tensor) -> None:
    given, labels = inputs(dtype=torch.float32), targets()
    exact = gradients(plain(given, labels), weights.float(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(given, labels), chunked(given, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)  # the same logits in bf16, the rest in fp32
    wanted, actual = (gradients(losses, weights.float(), given) for losses in (expected, found))
    for name in wanted:
        assert actual[name].dtype == torch.float32
        assert 1e-5 < distance(actual[name], exact[name]) < 1.2 * distance(wanted[name], exact[name])


def test_no_position_at_all() -> None:
    given = inputs(positions=0)
    found = chunked(given, targets(0))
    assert found.shape == (0,)
    wanted = gradients(found, torch.zeros(0), given)
    assert wanted["x"].shape == (0, H)
    assert not wanted["w"].any()
    assert not wanted["b"].any()


def test_backward_twice_and_beside_another_use_of_the_weight() -> None:
    given, labels = inputs(), targets()

    def twice(losses: Any) -> tuple[Tensor, ...]:
        loss = losses(given, labels).mean() + given["w"].square().sum()
        first = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(given.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return first

    for found, expected in zip(twice(chunked), twice(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_second_derivatives_are_refused() -> None:
    given = inputs()
    (dx,) = torch.autograd.grad(chunked(given, targets()).square().sum(), [given["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(("trains", "products"), [("xwb", 3), ("xw", 3), ("x", 2), ("w", 2), ("xb", 2), ("", 1)])
def test_no_product_is_made_twice(trains: str, products: int) -> None:
    given, labels = inputs(trains=trains), targets()

    def step(losses: Any) -> Any:
        loss = losses(given, labels).mean()
        return loss.backward() if trains else None

    assert count_flops(lambda: step(chunked)) == count_flops(lambda: step(plain)) == products * 2 * N * H * V


def test_without_gradients_only_logits_are_computed() -> None:
    given, labels = inputs(), targets()
    with torch.no_grad():
        assert count_flops(lambda: chunked(given, labels)) == 2 * N * H * V
        assert not chunked(given, labels).requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors_in(output))])
        return output


@pytest.mark.parametrize("weights", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_logits_exist_a_chunk_at_a_time(weights: Tensor) -> None:
    given, labels = inputs(), targets()
    with Largest() as largest:
        gradients(chunked(given, labels, 3), weights, given)
    assert largest.elements == V * H  # of dW; logits are 3 · V
    with Largest() as largest:
        gradients(plain(given, labels), weights, given)
    assert largest.elements == N * V
