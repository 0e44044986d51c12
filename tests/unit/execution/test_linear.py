from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rgft.execution.binding import Binding
from rgft.execution.linear import layout_of
from rgft.execution.views import bind
from tests.unit.execution.slices import slice_gradients
from tests.unit.execution.split_toy import HEADS, HIDDEN, WIDTH, Block, Conv1D, activate, head_partition

LAYERS = ["linear", "no_bias", "conv1d"]


def bound(layers: str, seed: int = 0) -> tuple[Block, Block, Binding]:
    model, plain = Block(layers, seed), Block(layers, seed)
    return model, plain, bind(model, head_partition(model))


def passes(net: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Output and dX, with gradients left in the parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y, x.grad


INPUTS: dict[str, Callable[[], Tensor]] = {
    "1d": lambda: torch.randn(WIDTH),
    "2d": lambda: torch.randn(7, WIDTH),
    "3d": lambda: torch.randn(3, 5, WIDTH),
    "3d transposed": lambda: torch.randn(5, 3, WIDTH).transpose(0, 1),
    "3d transposed, few": lambda: torch.randn(2, 5, WIDTH).transpose(0, 1),  # torch multiplies in batches if it may
    "4d": lambda: torch.randn(2, 3, 5, WIDTH),
    "empty": lambda: torch.randn(0, WIDTH),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("shape", INPUTS)
def test_all_active_is_the_plain_module_bit_for_bit(layers: str, shape: str, autocast: bool) -> None:
    if layers == "conv1d" and shape.startswith("3d transposed"):
        pytest.skip("Conv1D's own view() refuses such inputs")
    model, plain, binding = bound(layers)
    x = INPUTS[shape]()
    y, dx = passes(model, x, autocast)
    expected_y, expected_dx = passes(plain, x, autocast)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(y, expected_y)
    assert torch.equal(dx, expected_dx)
    for name, found, expected in slice_gradients(binding, plain):
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("layers", LAYERS)
def test_every_active_set(layers: str) -> None:
    model, plain, binding = bound(layers)
    x = torch.randn(3, 5, WIDTH)
    y, dx = passes(plain, x)
    for flags in itertools.product([False, True], repeat=HEADS + 1):
        active = [name for name, on in zip([*binding.partition.names, "rest"], flags, strict=False) if on]
        activate(binding, *active)
        found_y, found_dx = passes(model, x)
        assert torch.equal(found_y, y)
        assert torch.equal(found_dx, dx)
        for name, found, expected in slice_gradients(binding, plain):
            if name in active:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            else:
                assert found is None, name


def test_nothing_active_and_no_dx_makes_no_graph() -> None:
    model, _, binding = bound("linear")
    activate(binding)
    assert not model(torch.randn(2, WIDTH)).requires_grad
    activate(binding, "head.0")
    with torch.no_grad():
        assert not model(torch.randn(2, WIDTH)).requires_grad


class _Products(TorchDispatchMode):
    """Shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("active", "products"),
    [
        ((), []),
        (("head.1",), [(WIDTH, 8), (8, WIDTH)]),
        (("head.0", "head.1"), [(WIDTH, 16), (16, WIDTH)]),
        (("head.0", "head.2"), [(WIDTH, 8), (WIDTH, 8), (8, WIDTH), (8, WIDTH)]),
        (("head.0", "head.1", "head.2"), [(WIDTH, 24), (24, WIDTH)]),
    ],
)
@pytest.mark.parametrize("layers", LAYERS)
def test_dw_is_one_dense_product_per_run_of_neighbours(
    layers: str, active: tuple[str, ...], products: list[tuple[int, int]]
) -> None:
    model, _, binding = bound(layers)
    activate(binding, *active)
    x = torch.randn(50, WIDTH, requires_grad=True)
    loss = model(x).square().sum()
    with _Products() as seen:
        loss.backward()
    dw = [shape for shape in seen.shapes if shape[0] != 50]
    expected = [shape[::-1] for shape in products] if layers == "conv1d" else products
    assert sorted(dw) == sorted(expected)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("active", "columns"), [((), 0), (("head.1",), 8), (("head.0", "head.2"), 16)])
def test_only_the_inputs_that_dw_needs_are_saved(layers: str, active: tuple[str, ...], columns: int) -> None:
    model, _, binding = bound(layers)
    activate(binding, *active)
    x = torch.randn(50, HIDDEN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.down(x)
    activations = [t for t in saved if t.shape[0] == 50 or t.shape[-1] == 50]
    assert sum(t.untyped_storage().nbytes() for t in activations) == 50 * columns * 4


@pytest.mark.parametrize("layers", LAYERS)
def test_gradients_of_views_are_disjoint_memory(layers: str) -> None:
    model, plain, binding = bound(layers)
    x = torch.randn(4, WIDTH)
    passes(model, x)
    marks = [p.grad for parameters in binding.parameters.values() for p in parameters if p.grad is not None]
    for i, mark in enumerate(marks):
        mark.fill_(float(i))
    assert all(bool((mark == i).all()) for i, mark in enumerate(marks))
    activate(binding, *binding.partition.names)
    for micro in range(3):
        for net in (model, plain):
            passes(net, x + micro)
    for name, found, expected in slice_gradients(binding, plain):
        assert found is not None
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("layers", LAYERS)
def test_changing_sets_between_micro_batches_accumulate(layers: str) -> None:
    model, plain, binding = bound(layers)
    x = torch.randn(4, WIDTH)
    passes(model, x)
    first = binding.parameters["head.0"]
    for parameter in first:
        parameter.requires_grad_(False)
    passes(model, x)
    passes(plain, x)
    for name, found, expected in slice_gradients(binding, plain):
        torch.testing.assert_close(found, expected * (1 if name == "head.0" else 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_double_backward_raises(layers: str) -> None:
    model, _, binding = bound(layers)
    x = torch.randn(4, WIDTH, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
    weight = binding.parameters["head.0"][0]
    (dw,) = torch.autograd.grad(model(x).square().sum(), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.square().sum().backward()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("active", [("head.0", "head.1", "head.2", "rest"), ("head.1",)])
def test_non_reentrant_checkpointing(layers: str, active: tuple[str, ...]) -> None:
    model, plain, binding = bound(layers)
    activate(binding, *active)
    x = torch.randn(3, 5, WIDTH)
    _, dx = passes(lambda t: checkpoint(model, t, use_reentrant=False), x)  # type: ignore[arg-type]
    _, expected_dx = passes(plain, x)
    assert torch.equal(dx, expected_dx)
    for name, found, expected in slice_gradients(binding, plain):
        if name in active:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert found is None


@pytest.mark.parametrize("layers", LAYERS)
def test_a_callers_autocast_around_backward_changes_nothing(layers: str) -> None:
    model, _, binding = bound(layers)
    x = torch.randn(4, WIDTH)
    passes(model, x)
    outside = [p.grad for parameters in binding.parameters.values() for p in parameters]
    model.zero_grad()
    loss = model(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    inside = [p.grad for parameters in binding.parameters.values() for p in parameters]
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))  # type: ignore[arg-type]


def test_inputs_by_keyword() -> None:
    model, plain, _ = bound("linear")
    x = torch.randn(2, WIDTH)
    assert torch.equal(model.up(input=x), plain.up(input=x))


def test_conv1d_is_known_by_structure() -> None:
    from transformers.pytorch_utils import Conv1D as TransformersConv1D

    assert layout_of(TransformersConv1D(6, 4)) == layout_of(Conv1D(6, 4)) != layout_of(nn.Linear(4, 6))
    assert layout_of(nn.ConvTranspose1d(4, 6, 1)) is None

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert layout_of(Scaled(4, 6)) is None


def test_subclasses_with_a_forward_of_their_own_are_assembled() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    models = []
    for _ in range(2):
        model = Block()
        model.up = Scaled(WIDTH, HIDDEN)
        models.append(model)
    model, plain = models
    plain.load_state_dict(model.state_dict())
    binding = bind(model, head_partition(model))
    x = torch.randn(3, WIDTH)
    assert torch.equal(passes(model, x)[0], passes(plain, x)[0])
    for name, found, expected in slice_gradients(binding, plain):
        assert found is not None
        assert torch.equal(found, expected), name
