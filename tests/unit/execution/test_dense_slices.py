"""A weight that is stored slice by slice goes through everything that torch does to modules, and back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rgft.errors import StorageError
from rgft.execution.binding import Binding
from rgft.execution.fused_kernels import FusedKernels
from rgft.execution.views import bind
from rgft.partition import partition
from tests.unit.execution.split_toy import HIDDEN, WIDTH, Block, head_partition
from tests.unit.execution.test_views import one_weight, train

LAYERS = ["linear", "conv1d"]
#: The weight that is split along its columns.
COLUMNS = {"linear": "down.weight", "no_bias": "down.weight", "conv1d": "up.weight"}


def fused(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)


def laid_out(layers: str = "linear", steps: int = 1) -> tuple[Block, Binding, AdamW, nn.Parameter]:
    """A bound block under a fused optimizer, after `steps`, and its parameter that is stored by columns."""
    model = Block(layers)
    parameter = model.get_parameter(COLUMNS[layers])
    assert parameter.is_contiguous()
    binding = bind(model, head_partition(model))
    optimizer = fused(model)
    FusedKernels(optimizer, binding)
    train(model, optimizer, steps)
    assert parameter.stride() == (1, parameter.shape[0])
    return model, binding, optimizer, parameter


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 2e-6) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)


def test_steps_do_not_look_at_layouts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, optimizer, _ = laid_out()
    looks: list[int] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **more: looks.append(1) or empty_like(*args, **more))
    train(model, optimizer, 2)
    assert looks == []


@pytest.mark.parametrize("layers", LAYERS)
def test_shape_and_values_are_as_they_were(layers: str) -> None:
    model, binding, _, parameter = laid_out(layers, steps=0)
    plain = Block(layers)
    assert torch.equal(parameter, plain.get_parameter(COLUMNS[layers]))
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
    binding.check()


@pytest.mark.parametrize("layers", LAYERS)
def test_restore_leaves_no_trace(layers: str) -> None:
    model = Block(layers)
    before = [(n, id(p), p.shape, p.stride(), p.requires_grad) for n, p in model.named_parameters()]
    attributes = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    binding = bind(model, head_partition(model))
    optimizer = fused(model)
    FusedKernels(optimizer, binding)
    train(model, optimizer)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    binding.restore()
    assert [(n, id(p), p.shape, p.stride(), p.requires_grad) for n, p in model.named_parameters()] == before
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == attributes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    binding.restore()  # again: nothing to do
    for view in (p for parameters in binding.parameters.values() for p in parameters if p.dim() > 1):
        view.grad = torch.ones_like(view)
    columns = model.get_parameter(COLUMNS[layers])
    optimizer.step()  # an optimizer that is used on steps slices that are nobody's
    assert torch.equal(columns, trained[COLUMNS[layers]])
    again = bind(model, head_partition(model))
    again.check()
    again.restore()


def test_a_weight_with_strides_of_its_own_gets_them_back() -> None:
    model = nn.Linear(4, 6, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 6).t())
    values, own = model.weight.detach().clone(), model.weight
    binding = bind(model, one_weight((6, 4), (0, 3), (3, 6)))  # rows of a weight that is stored by columns
    FusedKernels(fused(model), binding)
    assert all(parameters[0].is_contiguous() for parameters in binding.parameters.values())
    binding.restore()
    assert model.weight is own
    assert own.stride() == (1, 6)
    assert torch.equal(own, values)


@pytest.mark.parametrize("layers", LAYERS)
def test_state_dict_is_plain(layers: str, tmp_path: Path) -> None:
    model, _, _, parameter = laid_out(layers)
    state = model.state_dict()
    assert list(state) == list(Block(layers).state_dict())
    assert all(value.is_contiguous() for value in state.values())
    assert torch.equal(state[COLUMNS[layers]], parameter)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert model.state_dict(keep_vars=True)[COLUMNS[layers]] is parameter


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
def test_loading_goes_through_to_the_slices(layers: str, assign: bool) -> None:
    model, binding, _, _ = laid_out(layers)
    other = Block(layers, seed=1)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    binding.check()
    optimizer = fused(model)
    FusedKernels(optimizer, binding)
    train(model, optimizer)
    train(other, fused(other))
    assert_close(model, other)
    binding.check()
    binding.restore()
    assert all(p.is_contiguous() for p in model.parameters())


def test_assigned_weights_are_laid_out_again_before_the_next_step() -> None:
    runs = [laid_out("no_bias") for _ in range(2)]  # an assigned whole parameter is another one, also to torch
    for (model, binding, optimizer, _), assign in zip(runs, (False, True), strict=True):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        weight = model.state_dict(keep_vars=True)["down.weight"]
        assert weight.is_contiguous() == assign
        train(model, optimizer, steps=2)
        assert weight.stride() == (1, WIDTH)
        binding.check()
    assert_close(runs[1][0], runs[0][0])


@pytest.mark.parametrize("cast", ["double", "bfloat16"])
@pytest.mark.parametrize("layers", LAYERS)
def test_casts_keep_the_layout(layers: str, cast: str) -> None:
    model, binding, optimizer, parameter = laid_out(layers)
    plain = Block(layers)
    plain.load_state_dict(model.state_dict())
    other = fused(plain)
    other.load_state_dict({"state": {}, "param_groups": other.state_dict()["param_groups"]})
    optimizer.state.clear()
    for net in (model, plain):
        getattr(net, cast)()
    binding.check()
    dtype = next(plain.parameters()).dtype
    assert (parameter.dtype, parameter.stride()) == (dtype, (1, parameter.shape[0]))
    assert model.state_dict()[COLUMNS[layers]].is_contiguous()
    train(model, optimizer)
    train(plain, other)
    assert_close(model, plain, tolerance=4 * torch.finfo(dtype).eps)
    binding.check()
    binding.restore()
    assert parameter.is_contiguous()
    assert parameter.dtype == dtype


def test_gradients_move_along_with_a_cast() -> None:
    model, binding, _, _ = laid_out()
    model(torch.ones(2, WIDTH)).sum().backward()
    view = binding.parameters["head.0"][-1]
    assert view.grad is not None
    expected = view.grad.double()
    model.double()
    assert torch.equal(view.grad, expected)
    assert view.grad.stride() == view.stride() == (1, WIDTH)


def test_deepcopy_has_memory_of_its_own() -> None:
    model, binding, optimizer, parameter = laid_out()
    before = parameter.detach().clone()
    twin, twins_optimizer = copy.deepcopy((model, optimizer))  # together: the optimizer then steps the copy
    shown = dict(twin.named_parameters())
    assert {id(p) for group in twins_optimizer.param_groups for p in group["params"]} == set(map(id, shown.values()))
    train(twin, twins_optimizer, steps=2)
    assert torch.equal(parameter, before)
    train(model, optimizer, steps=2)
    assert_close(twin, model, tolerance=0.0)
    binding.restore()
    assert twin.state_dict(keep_vars=True)["down.weight"].stride() == (1, WIDTH)


def test_writing_into_a_copys_state_writes_into_the_copy() -> None:
    """Moving averages do this."""
    twin = copy.deepcopy(laid_out()[0])
    for value in twin.state_dict().values():
        value.zero_()
    assert not any(p.any() for p in twin.parameters())


def test_pickles_are_plain() -> None:
    model, _, _, _ = laid_out()
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.down) is nn.Linear
    assert loaded.down.weight.is_contiguous()
    assert isinstance(loaded.down.weight, nn.Parameter)
    assert loaded.down.weight.requires_grad
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_pickles_keep_ties() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    binding = bind(model, one_weight((4, 4), (0, 1), (1, 4), parameter="0.weight", dim=1))
    optimizer = fused(model)
    FusedKernels(optimizer, binding)
    for _ in range(2):
        loaded: Any = pickle.loads(pickle.dumps(model))
        assert loaded[0].weight is loaded[2].weight
        assert torch.equal(loaded[0].weight, model.state_dict()["0.weight"])
        model(torch.eye(4)).square().sum().backward()
        optimizer.step()
    assert model[0].__dict__["_parameters"]["head_0_weight"].stride() == (1, 4)


def test_views_that_went_astray_are_noticed() -> None:
    model, binding, _, _ = laid_out()
    view = binding.parameters["head.1"][-1]
    view.data = view.data.clone()
    with pytest.raises(StorageError, match=r"'down\.weight', 8:16 of dimension 1: memory of its own"):
        binding.check()
    with pytest.raises(StorageError, match="share no memory"):
        model.state_dict()
    with pytest.raises(StorageError, match="trained apart"):
        binding.restore()
    assert model.down.weight.stride() == (HIDDEN, 1)


def test_what_a_caller_holds_is_not_written_over() -> None:
    """A state that was taken before keeps its values when the weight moves to other memory."""
    model = Block()
    binding = bind(model, head_partition(model))
    held: dict[str, Tensor] = model.state_dict()
    expected = held["down.weight"].clone()
    FusedKernels(fused(model), binding)
    assert torch.equal(held["down.weight"], expected)


def test_gpt2_saves_in_its_own_format(tmp_path: Path) -> None:
    """Its fused q, k, v are split along columns of one [I, O] weight, its projections along rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    components = partition(model, "head", ffn_blocks=2)
    binding = bind(model, components)
    optimizer = fused(model)
    FusedKernels(optimizer, binding)
    x = torch.arange(8).unsqueeze(0)
    model(x, labels=x).loss.backward()
    optimizer.step()
    attention: Any = model.transformer.h[0].attn
    projections = {name: {p.stride() for p in m.parameters() if p.dim() == 2} for name, m in attention.named_children()}
    assert (projections["c_attn"], projections["c_proj"]) == ({(1, 8)}, {(8, 1)})
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(x).logits, model(x).logits)
    binding.restore()
    assert torch.equal(loaded(x).logits, model(x).logits)
