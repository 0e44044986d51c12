from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding
from rgft.execution.views import bind


class Experts(nn.Module):
    """One 3-D weight [experts, I, O]; every row of x goes to one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(3, -1, 4), self.weight)


CASES = {
    "attention in_proj rows": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight", 0),
    "attention in_proj bias": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_bias", 0),
    "attention out_proj columns": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "out_proj.weight", 1),
    "experts": (Experts, "weight", 0),
    "expert inputs": (Experts, "weight", 1),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 6, 3), "weight", 1),
    "convolution inputs": (lambda: nn.Conv2d(2, 6, 3), "weight", 1),
    "embedding columns": (lambda: nn.Embedding(7, 6, padding_idx=0), "weight", 1),
    "norm": (lambda: nn.LayerNorm(8), "weight", 0),
    "linear bias only": (lambda: nn.Linear(8, 6), "bias", 0),
}


def run(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=next(module.parameters()).dtype)

    if isinstance(module, nn.MultiheadAttention):
        x = randn(2, 5, 8)
        return module(x, x, x, need_weights=False)[0]
    if isinstance(module, Experts):
        return module(randn(6, 4))
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return module(randn(2, 2, 6, 6))
    if isinstance(module, nn.Embedding):
        return module(torch.tensor([[0, 1, 2], [3, 3, 6]]))
    return module(randn(4, 8))


def split_in_two(module: nn.Module, name: str, dim: int) -> Binding:
    components = []
    for other, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if other != name:
            whole = (ParameterSlice(parameter=other, shape=shape),)
            components.append(Component(name=f"whole.{other}", kind="other", depth=1, slices=whole))
            continue
        cut = max(1, shape[dim] // 3)
        for i, (a, b) in enumerate([(0, cut), (cut, shape[dim])]):
            part = ParameterSlice(parameter=name, shape=shape, dim=dim, start=a, stop=b)
            components.append(Component(name=f"part.{i}", kind="expert", index=i, depth=1, slices=(part,)))
    return bind(module, Partition(components=tuple(components), layers=(), granularity="custom"))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_plain_modules(case: str) -> None:
    make, name, dim = CASES[case]
    module = make()
    plain = copy.deepcopy(module)
    binding = split_in_two(module, name, dim)
    for active in [{"part.0", "part.1"}, {"part.0"}, {"part.1"}, set()]:
        for component, parameters in binding:
            parameters[0].requires_grad_(component.name in active or component.name.startswith("whole"))
        plain.get_parameter(name).requires_grad_(bool(active))  # torch's bits may depend on it
        module.zero_grad()
        plain.zero_grad()
        outputs = []
        for net in (module, plain):
            y = run(net)
            outputs.append(y)
            if y.requires_grad:
                y.square().sum().backward()
        assert torch.equal(*outputs)
        dense = plain.get_parameter(name).grad
        for component, parameters in binding:
            if component.name.startswith("part"):
                found = parameters[0].grad
                if component.name not in active:
                    assert found is None
                    continue
                assert found is not None
                assert dense is not None
                assert torch.equal(found, component.slices[0].of(dense))
                assert found.untyped_storage().nbytes() == found.nbytes  # the dense dW is not kept alive
    binding.restore()
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("case", CASES)
def test_casts_and_copies(case: str) -> None:
    make, name, dim = CASES[case]
    module = make()
    plain = copy.deepcopy(module).double()
    binding = split_in_two(module, name, dim)
    twin = copy.deepcopy(module).double()
    module.double()
    binding.check()
    for net in (module, twin):
        assert torch.equal(run(net), run(plain))
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in plain.state_dict().items())


def test_double_backward_raises() -> None:
    module = Experts()
    split_in_two(module, "weight", 0)
    views = list(module.parameters())
    grads = torch.autograd.grad(run(module).square().sum(), views, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_a_gradient_shared_with_another_branch_is_not_overwritten() -> None:
    """Both addends get the same dense gradient; accumulating into one must not reach the other."""
    module, other = Experts(), nn.Parameter(torch.randn(3, 4, 5))
    binding = split_in_two(module, "weight", 0)
    for _ in range(2):
        (module.weight + other).square().sum().backward()
    expected = 4 * (module.weight + other).detach()
    assert other.grad is not None
    torch.testing.assert_close(other.grad, expected)
    for component, (parameter,) in binding:
        torch.testing.assert_close(parameter.grad, component.slices[0].of(expected))


def test_tied_embedding_and_head_share_one_split_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 8)
            self.head = nn.Linear(8, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(x)))

    model, plain = Tied(), Tied()
    binding = split_in_two(model, "embedding.weight", 0)
    x = torch.tensor([[0, 1, 6], [2, 2, 5]])
    assert torch.equal(model(x), plain(x))
    for net in (model, plain):
        net(x).square().sum().backward()
    assert plain.embedding.weight.grad is not None
    for component, (parameter,) in binding:
        torch.testing.assert_close(parameter.grad, component.slices[0].of(plain.embedding.weight.grad))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_transformer_encoder_layers_keep_their_inference_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    plain = copy.deepcopy(layer)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    dims = {"self_attn.in_proj_weight": 0, "linear1.weight": 0, "linear1.bias": 0, "linear2.weight": 1}
    components = [
        Component(
            name=f"half.{i}", kind="other", depth=1, index=i,
            slices=tuple(
                ParameterSlice(
                    parameter=n, shape=shapes[n], dim=d, start=i * shapes[n][d] // 2, stop=(i + 1) * shapes[n][d] // 2
                )
                for n, d in dims.items()
            ),
        )
        for i in range(2)
    ]  # fmt: skip
    bind(layer, Partition(components=tuple(components), layers=(), granularity="custom"))
    fast = torch._transformer_encoder_layer_fwd
    calls: list[int] = []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    assert len(calls) == 2
    assert torch.equal(layer.train()(x.clone()).detach() * 0, torch.zeros_like(x))
    assert layer(x).requires_grad
