"""Convolutions that are split along their output channels, against the plain module and the masked reference."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding
from rgft.execution.fused_kernels import FusedKernels
from rgft.execution.linear import layout_of
from rgft.execution.reference import ReferenceUpdate, reference_gradients
from rgft.execution.views import bind
from rgft.telemetry.flop_counter import count_flops
from tests.unit.execution.slices import slice_gradients
from tests.unit.execution.split_toy import activate

CHANNELS = 12
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

#: Convolutions of 4 → 12 channels (of 12 → 12, depthwise).
CASES: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, CHANNELS, 3, padding=1),
    "1d strided, no bias": lambda: nn.Conv1d(4, CHANNELS, 5, stride=2, bias=False),
    "2d": lambda: nn.Conv2d(4, CHANNELS, 3, padding=1),
    "2d pointwise": lambda: nn.Conv2d(4, CHANNELS, 1, bias=False),
    "2d strided": lambda: nn.Conv2d(4, CHANNELS, (3, 1), stride=(2, 1), padding=(1, 0)),
    "2d dilated": lambda: nn.Conv2d(4, CHANNELS, 3, dilation=2, padding=2),
    "2d valid": lambda: nn.Conv2d(4, CHANNELS, 3, padding="valid"),
    "2d same": lambda: nn.Conv2d(4, CHANNELS, 3, padding="same"),
    "2d same, even": lambda: nn.Conv2d(4, CHANNELS, (2, 3), padding="same", dilation=(3, 1)),
    "2d reflect": lambda: nn.Conv2d(4, CHANNELS, 3, padding=2, padding_mode="reflect"),
    "2d circular same": lambda: nn.Conv2d(4, CHANNELS, 4, padding="same", padding_mode="circular"),
    "2d grouped": lambda: nn.Conv2d(4, CHANNELS, 3, padding=1, groups=2),
    "2d depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "2d depthwise, three each": lambda: nn.Conv2d(4, CHANNELS, 3, padding=1, groups=4, bias=False),
    "3d": lambda: nn.Conv3d(4, CHANNELS, 2, stride=2),
    "3d grouped": lambda: nn.Conv3d(4, CHANNELS, 3, padding=1, groups=4),
}
#: Where the weight is cut; with groups of six (2d grouped) and of three channels the second lies across groups.
CUTS = {"even": (0, 3, 6, 9, 12), "uneven": (0, 2, 7, 12)}
ON = ("part.0", "part.1", "part.2", "part.3", "rest")


def module_of(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case]().to(dtype)


def in_format(module: nn.Module, form: torch.memory_format) -> nn.Module:
    return module.to(memory_format=form)  # type: ignore[call-overload]


def input_of(module: nn.Module, seed: int = 0, rows: int = 3) -> Tensor:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    size = (9, 7, 6)[: len(module.kernel_size)]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, module.in_channels, *size, generator=generator).to(module.weight.dtype)


def channels(module: nn.Module, cuts: Collection[int], *, bias: bool = True) -> Partition:
    """`part.i`: some output channels and their biases; `rest`: the whole bias where it is not to be split."""
    components = []
    for i, (start, stop) in enumerate(pairwise(cuts)):
        slices = tuple(
            ParameterSlice(parameter=name, shape=tuple(p.shape), dim=0, start=start, stop=stop)
            for name, p in module.named_parameters()
            if bias or name == "weight"
        )
        components.append(Component(name=f"part.{i}", kind="channel_block", index=i, depth=1, slices=slices))
    if not bias and getattr(module, "bias", None) is not None:
        whole = ParameterSlice(parameter="bias", shape=(CHANNELS,))
        components.append(Component(name="rest", kind="rest", depth=1, slices=(whole,)))
    return Partition(components=tuple(components), layers=(), granularity="custom")


def passes(net: Callable[[Tensor], Tensor], x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Output and dX, with gradients left in the parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return y, x.grad


def assert_same_gradients(binding: Binding, plain: nn.Module) -> None:
    for name, found, expected in slice_gradients(binding, plain):
        assert found is not None
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.transpose(1, 2)
    .contiguous().transpose(1, 2),
    "unbatched": lambda t: t[0],
    "empty": lambda t: t[:0],
    "one row": lambda t: t[:1],
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_all_active_is_the_plain_module_bit_for_bit(case: str, form: str, autocast: bool) -> None:
    model, plain = module_of(case), module_of(case)
    x = FORMATS[form](input_of(plain))
    try:
        expected_y, expected_dx = passes(plain, x, autocast)
    except RuntimeError:
        pytest.skip("the plain module refuses such inputs")
    for bias in (True, False):
        binding = bind(model, channels(model, CUTS["uneven"], bias=bias))
        y, dx = passes(model, x, autocast)
        assert torch.equal(y, expected_y)
        assert (y.dtype, y.stride()) == (expected_y.dtype, expected_y.stride())
        assert torch.equal(dx, expected_dx)
        assert_same_gradients(binding, plain)
        binding.restore()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("2d")])
def test_a_weight_in_channels_last(case: str, when: str) -> None:
    plain, model = in_format(module_of(case), torch.channels_last), module_of(case)
    if when == "before":
        in_format(model, torch.channels_last)
    x = FORMATS["channels last"](input_of(plain))
    binding = bind(model, channels(model, CUTS["even"]))
    in_format(model, torch.channels_last)
    binding.check()
    for found, expected in zip(passes(model, x), passes(plain, x), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert_same_gradients(binding, plain)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_active_set_against_the_reference(case: str, cuts: str, dtype: torch.dtype) -> None:
    model, plain = module_of(case, dtype), module_of(case, dtype)
    x = input_of(plain)
    y, dx = passes(plain, x)
    for bias in (True, False):
        partition = channels(model, CUTS[cuts], bias=bias)
        expected = reference_gradients(plain, partition, lambda net: net(x).float().square().sum())
        binding = bind(model, partition)
        for flags in itertools.product([False, True], repeat=len(partition)):
            active = [name for name, on in zip(partition.names, flags, strict=True) if on]
            activate(binding, *active)
            found_y, found_dx = passes(model, x)
            assert torch.equal(found_y, y)
            assert torch.equal(found_dx, dx)
            for component, parameters in binding:
                for parameter, gradient in zip(parameters, expected[component.name], strict=True):
                    if component.name not in active:
                        assert parameter.grad is None
                        continue
                    assert gradient is not None
                    assert parameter.grad is not None
                    assert (parameter.grad - gradient).norm() <= TOLERANCE[dtype] * gradient.norm()
        binding.restore()


@pytest.mark.parametrize("case", ["1d", "2d reflect", "2d grouped", "2d depthwise"])
def test_autocast_against_the_plain_module(case: str) -> None:
    model, plain = module_of(case), module_of(case)
    binding = bind(model, channels(model, CUTS["even"]))
    activate(binding, "part.1", "part.2")
    x = input_of(plain)
    passes(plain, x, autocast=True)
    passes(model, x, autocast=True)
    for name, found, expected in slice_gradients(binding, plain):
        if name in ("part.1", "part.2"):
            assert found is not None
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("case", ["2d", "2d depthwise"])
def test_a_callers_autocast_around_backward_changes_nothing(case: str) -> None:
    model = module_of(case)
    binding = bind(model, channels(model, CUTS["even"]))
    x, found = input_of(model), []
    for enabled in (False, True):
        activate(binding, "part.0", "part.3")
        loss = model(x).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        found.append([p.grad for name in ("part.0", "part.3") for p in binding.parameters[name]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class _Backwards(TorchDispatchMode):
    """Output channels and mask of all convolution-backward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution_backward" in func.__name__:
            self.calls.append((args[0].shape[1], list(args[-1])))
        return func(*args, **(kwargs or {}))


ALL, DX, DW = [True, True, True], [True, False, False], [False, True, False]


@pytest.mark.parametrize(
    ("case", "cuts", "active", "calls"),
    [
        ("2d", "even", ON, [(12, ALL)]),
        ("2d", "even", (), [(12, DX)]),
        ("2d", "even", ("part.1",), [(12, DX), (3, DW)]),
        ("2d", "even", ("part.1", "part.2"), [(12, DX), (6, DW)]),
        ("2d", "even", ("part.0", "part.2"), [(12, DX), (3, DW), (3, DW)]),
        ("2d depthwise", "even", ("part.1", "part.2"), [(12, DX), (6, DW)]),
        ("2d grouped", "even", ("part.0", "part.1"), [(12, DX), (6, DW)]),
        ("2d grouped", "even", ("part.1",), [(12, DX), (3, DW)]),
        ("2d grouped", "uneven", ("part.1",), [(12, DX), (4, DW), (1, DW)]),
        ("2d depthwise, three each", "uneven", ("part.1",), [(12, DX), (1, DW), (3, DW), (1, DW)]),
    ],
)
def test_dw_is_one_call_per_run_of_neighbours(
    case: str, cuts: str, active: tuple[str, ...], calls: list[tuple[int, list[bool]]]
) -> None:
    model = module_of(case)
    binding = bind(model, channels(model, CUTS[cuts]))
    activate(binding, *active)
    loss = model(input_of(model).requires_grad_()).square().sum()
    with _Backwards() as seen:
        loss.backward()
    assert seen.calls == calls


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_flops_of_dw_are_the_active_share(case: str, cuts: str) -> None:
    model = module_of(case)
    binding = bind(model, channels(model, CUTS[cuts]))
    x = input_of(model)
    forward = count_flops(lambda: model(x))
    for name, share in zip(binding.parameters, (b - a for a, b in pairwise(CUTS[cuts])), strict=True):
        activate(binding, name)
        counted = count_flops(lambda: model(x).square().sum().backward())
        assert counted - forward == pytest.approx(forward * share / CHANNELS)


@pytest.mark.parametrize("active", [(), ("part.1",), ON])
def test_x_is_saved_once_and_nothing_else(active: tuple[str, ...]) -> None:
    model = module_of("2d")
    binding = bind(model, channels(model, CUTS["even"]))
    activate(binding, *active)
    x = input_of(model).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    weight = model.get_parameter("channel_block_0_weight").untyped_storage().data_ptr()
    others = {t.untyped_storage().data_ptr() for t in saved} - {weight}
    assert others == {x.untyped_storage().data_ptr()}


def test_nothing_active_and_no_dx_makes_no_graph() -> None:
    model = module_of("2d")
    binding = bind(model, channels(model, CUTS["even"]))
    activate(binding)
    assert not model(input_of(model)).requires_grad
    activate(binding, "part.0")
    with torch.no_grad():
        assert not model(input_of(model)).requires_grad


@pytest.mark.parametrize("case", ["2d", "2d grouped", "1d"])
def test_accumulation(case: str) -> None:
    model, plain = module_of(case), module_of(case)
    binding = bind(model, channels(model, CUTS["even"]))
    for seed in range(3):
        for net in (model, plain):
            passes(net, input_of(plain, seed))
    assert_same_gradients(binding, plain)
    marks = [p.grad for parameters in binding.parameters.values() for p in parameters if p.grad is not None]
    for i, mark in enumerate(marks):
        mark.fill_(float(i))
    assert all(bool((mark == i).all()) for i, mark in enumerate(marks))


@pytest.mark.parametrize("case", ["2d", "2d depthwise"])
@pytest.mark.parametrize("active", [ON, ("part.1",)])
def test_non_reentrant_checkpointing(case: str, active: tuple[str, ...]) -> None:
    model, plain = module_of(case), module_of(case)
    binding = bind(model, channels(model, CUTS["even"]))
    activate(binding, *active)
    x = input_of(plain)
    _, dx = passes(lambda t: checkpoint(model, t, use_reentrant=False), x)  # type: ignore[arg-type]
    assert torch.equal(dx, passes(plain, x)[1])
    for name, found, expected in slice_gradients(binding, plain):
        assert (found is not None) == (name in active)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_double_backward_raises() -> None:
    model = module_of("2d")
    binding = bind(model, channels(model, CUTS["even"]))
    (dw,) = torch.autograd.grad(model(input_of(model)).square().sum(), [binding.parameters["part.0"][0]],
                                create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.square().sum().backward()


def test_wrong_inputs_are_the_plain_modules_errors() -> None:
    model, plain = module_of("2d"), module_of("2d")
    bind(model, channels(model, CUTS["even"]))
    for x in (torch.randn(2, 5, 9, 7), torch.randn(9, 7)):
        errors = []
        for net in (model, plain):
            with pytest.raises(RuntimeError) as caught:
                net(x)
            errors.append(str(caught.value).partition(",")[0])
        assert errors[0] == errors[1]


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p, **kw: AdamW(p, lr=0.05, weight_decay=0.5, **kw),
    "sgd momentum": lambda p, **kw: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.5, **kw),
}
SCRIPT = [("part.0", "part.2"), ("part.2",), ON, ("part.1",), ("part.0", "part.3"), ON, ()]


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("case", ["2d", "2d grouped", "2d depthwise"])
def test_off_slices_keep_every_bit_and_on_slices_train_as_the_reference(
    case: str, maker: str, fused: bool, form: torch.memory_format
) -> None:
    model, plain = (in_format(module_of(case, torch.float64), form) for _ in range(2))
    partition = channels(model, CUTS["even"])
    reference = ReferenceUpdate(plain, partition, lambda groups: MAKERS[maker](groups, foreach=False))
    binding = bind(model, partition)
    optimizer = MAKERS[maker](list(model.parameters()), **({"fused": True} if fused else {"foreach": True}))
    kernels = FusedKernels(optimizer, binding)
    strides = plain.get_parameter("weight").stride()
    for number, active in enumerate(SCRIPT):
        activate(binding, *active)
        before = {n: [p.detach().clone() for p in parameters] for n, parameters in binding.parameters.items()}

        def loss(net: nn.Module, number: int = number) -> Tensor:
            return net(input_of(plain, number)).square().mean()

        if active:
            loss(model).backward()
        optimizer.step()
        reference.step(loss, active)
        for name, parameters in binding.parameters.items():
            same = [torch.equal(p, b) for p, b in zip(parameters, before[name], strict=True)]
            assert same == [name not in active] * len(same), (number, name)
    binding.check()
    assert all(p.stride() == strides for n, p in model.named_parameters() if n.endswith("weight"))
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    kernels.detach()
    binding.restore()


@pytest.mark.parametrize("case", ["1d", "2d grouped", "3d"])
def test_detaching_leaves_no_trace(case: str) -> None:
    model, plain = module_of(case), module_of(case)
    before = [(name, id(p), p.stride()) for name, p in model.named_parameters()]
    attributes = set(model.__dict__)
    binding = bind(model, channels(model, CUTS["even"]))
    assert type(model) is not type(plain)
    passes(model, input_of(plain))
    binding.restore()
    assert type(model) is type(plain)
    assert set(model.__dict__) == attributes
    assert [(name, id(p), p.stride()) for name, p in model.named_parameters()] == before
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("case", ["1d", "2d same, even", "2d depthwise", "3d"])
def test_copies_casts_and_files(case: str) -> None:
    model, plain = module_of(case), module_of(case)
    binding = bind(model, channels(model, CUTS["even"]))
    twin = copy.deepcopy(model)
    assert torch.equal(pickle.loads(pickle.dumps(model)).weight, plain.get_parameter("weight"))
    assert list(model.state_dict()) == list(plain.state_dict())
    other = {name: value + 1 for name, value in plain.state_dict().items()}
    twin.load_state_dict(other)
    for net in (model, twin, plain):
        net.double()
    binding.check()
    x = input_of(plain)
    passes(model, x)
    passes(plain, x)
    assert_same_gradients(binding, plain)
    assert all(p.grad is None for p in twin.parameters())
    assert torch.equal(twin.get_parameter("channel_block_0_weight"), other["weight"][:3].double())
    passes(twin, x)
    assert all(p.grad is not None for p in twin.parameters())


def test_what_is_no_plain_convolution_is_assembled() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, 2 * weight, bias)

    class Renamed(nn.Conv2d):
        pass

    assert layout_of(Renamed(4, 6, 1)) == layout_of(nn.Conv2d(4, 6, 1)) != layout_of(nn.Conv3d(4, 6, 1))
    assert layout_of(nn.ConvTranspose2d(4, 6, 1)) is None
    assert layout_of(Scaled(4, 6, 1)) is None
    torch.manual_seed(0)
    model = Scaled(4, CHANNELS, 3)
    plain = copy.deepcopy(model)
    binding = bind(model, channels(model, CUTS["even"]))
    x = input_of(plain)
    assert torch.equal(passes(model, x)[0], passes(plain, x)[0])
    assert_same_gradients(binding, plain)
