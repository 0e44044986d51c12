"""residual_dot and act_x_grad, against autograd with hooks of its own and against finite differences."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rgft.errors import ConfigError, DataError
from rgft.signals import ActXGrad, ResidualDot
from tests.families import FAMILIES
from tests.unit.signals.hand_made import LAYERS, by_head, by_layer, double, probe_of, untouched

# Output projection, width of one head component, heads.
PROJECTIONS = {
    "bert": ("attention.output.dense", 8, 4), "llama": ("self_attn.o_proj", 16, 2), "gpt2": ("attn.c_proj", 8, 4),
}  # fmt: skip


@contextmanager
def added_to_output(module: nn.Module, delta: torch.Tensor):
    def hook(module, args, output):
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def added_to_input(module: nn.Module, delta: torch.Tensor, start: int):
    def hook(module, args):
        x = args[0].clone()
        x[..., start : start + delta.shape[-1]] += delta
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


def brier(family: str, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Target by target, with the one-hot vector written out."""
    labels = batch["labels"]
    if family in ("llama", "gpt2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    probabilities, targets = logits.softmax(-1).flatten(0, -2), labels.flatten()
    terms = [
        (torch.eye(p.shape[0], dtype=p.dtype)[t] - p).square().sum()
        for p, t in zip(probabilities, targets, strict=True) if t != -100
    ]  # fmt: skip
    return torch.stack(terms).mean()


def both_gradients(family, model, batch, delta, added) -> tuple[torch.Tensor, torch.Tensor]:
    """∂R/∂δ and ∂L/∂δ for a δ = 0 added somewhere."""
    with added:
        out = model(**batch)
    residual = brier(family, out.logits, batch)
    return (
        torch.autograd.grad(residual, delta, retain_graph=True)[0],
        torch.autograd.grad(out.loss, delta)[0],
    )


def zeros(batch, width: int) -> torch.Tensor:
    return torch.zeros(*batch["input_ids"].shape, width, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_layers_and_heads_equal_two_direct_vector_jacobian_products(family: str) -> None:
    model, batch = double(family), FAMILIES[family].batch()
    partition = by_head(model, family)
    check = untouched(model)
    scores = ResidualDot(mode="signed").measure(probe_of(model, partition, batch))
    check()
    assert set(scores) == set(partition.names)
    path, width, heads = PROJECTIONS[family]
    for layer in LAYERS[family]:
        delta = zeros(batch, 32)
        of_r, of_l = both_gradients(family, model, batch, delta, added_to_output(model.get_submodule(layer), delta))
        assert scores[f"{layer}.rest"] == pytest.approx(float((of_r * of_l).sum()), rel=1e-9)
        for head in range(heads):
            delta = zeros(batch, width)
            added = added_to_input(model.get_submodule(f"{layer}.{path}"), delta, head * width)
            of_r, of_l = both_gradients(family, model, batch, delta, added)
            assert scores[f"{layer}.head.{head}"] == pytest.approx(float((of_r * of_l).sum()), rel=1e-9)


def test_equals_a_finite_difference_of_the_loss_along_the_residual_gradient() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    scores = ResidualDot(mode="signed").measure(probe_of(model, by_layer(model, LAYERS["bert"]), batch))
    for layer in LAYERS["bert"]:
        module, delta = model.get_submodule(layer), zeros(batch, 32)
        direction, _ = both_gradients("bert", model, batch, delta, added_to_output(module, delta))
        losses = []
        for sign in (1.0, -1.0):
            with added_to_output(module, sign * 1e-4 * direction), torch.no_grad():
                losses.append(float(model(**batch).loss))
        assert scores[layer] == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-6)


def test_modes_and_components_outside_the_layers() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    probe = probe_of(model, by_layer(model, LAYERS["bert"]), batch)
    against = lambda output, batch: -output.loss  # noqa: E731
    signed = ResidualDot(mode="signed", residual=against).measure(probe)
    assert set(signed) == set(LAYERS["bert"])
    assert all(value < 0.0 for value in signed.values())
    assert ResidualDot(mode="abs", residual=against).measure(probe) == {k: -v for k, v in signed.items()}
    assert ResidualDot(residual=against).measure(probe) == dict.fromkeys(signed, 0.0)
    assert ResidualDot(residual="loss").measure(probe) == pytest.approx({k: -v for k, v in signed.items()})
    with pytest.raises(ConfigError, match="mode"):
        ResidualDot(mode="clamp")  # type: ignore[arg-type]


def test_regression_and_tuple_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    loss = lambda m, b: (m(b[0]) - b[1]).abs().mean()  # noqa: E731
    partition = by_layer(model, ("0", "2"))
    scores = ResidualDot(mode="signed").measure(probe_of(model, partition, (x, y), loss))
    h = model[0](x).detach().requires_grad_()
    out = model[2](h.tanh())
    (of_r,) = torch.autograd.grad(((out - y) ** 2).sum() / 6, h, retain_graph=True)
    (of_l,) = torch.autograd.grad((out - y).abs().mean(), h)
    assert scores["0"] == pytest.approx(float((of_r * of_l).sum()), rel=1e-12)


def test_encoder_decoder_labels_are_not_shifted() -> None:
    model, batch = double("t5"), FAMILIES["t5"].batch()
    partition = by_layer(model, LAYERS["t5"])
    scores = ResidualDot(mode="signed").measure(probe_of(model, partition, batch))
    assert set(scores) == set(LAYERS["t5"])
    last = LAYERS["t5"][-1]
    delta = torch.zeros(*batch["labels"].shape, 32, dtype=torch.float64, requires_grad=True)
    of_r, of_l = both_gradients("t5", model, batch, delta, added_to_output(model.get_submodule(last), delta))
    assert scores[last] == pytest.approx(float((of_r * of_l).sum()), rel=1e-9)


def test_no_weight_gradient_is_computed() -> None:
    """Inside the loss nothing requires a gradient, so that dX is all there is to make."""
    model, batch = double("bert"), FAMILIES["bert"].batch()
    seen = []

    def loss(model, batch):
        seen.append(any(p.requires_grad for p in model.parameters()))
        return model(**batch).loss

    ResidualDot().measure(probe_of(model, by_layer(model, LAYERS["bert"]), batch, loss))
    assert seen == [False]
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_bottom_does_not_hide_the_layers_above_it() -> None:
    """As in a PEFT model: nothing at or below the first layer requires gradients."""
    model, batch = double("bert"), FAMILIES["bert"].batch()
    partition = by_layer(model, LAYERS["bert"])
    free = ResidualDot().measure(probe_of(model, partition, batch))
    for name, p in model.named_parameters():
        p.requires_grad_("layer.1" in name)
    check = untouched(model)
    assert ResidualDot().measure(probe_of(model, partition, batch)) == pytest.approx(free, rel=1e-12)
    check()


@pytest.mark.parametrize("signal", [ResidualDot(mode="signed"), ActXGrad()])
def test_torch_transformer_encoder_scores_layers(signal) -> None:
    model, batch = double("torch_transformer_encoder"), FAMILIES["torch_transformer_encoder"].batch()
    partition = by_layer(model, LAYERS["torch_transformer_encoder"])
    scores = signal.measure(probe_of(model, partition, batch))
    assert set(scores) == set(partition.layers)
    assert torch.backends.mha.get_fastpath_enabled()


def scaled_input(module: nn.Module, start: int, width: int):
    """Attaches a hook that scales columns of the module's input by s."""
    mask = torch.zeros(32, dtype=torch.float64)
    mask[start : start + width] = 1.0
    return lambda s: module.register_forward_pre_hook(lambda m, args: (args[0] * (1.0 + (s - 1.0) * mask),))


def scaled_output(module: nn.Module):
    """Attaches a hook that scales the module's (first) output by s."""

    def hook(s, out):
        return (out[0] * s, *out[1:]) if isinstance(out, tuple) else out * s

    return lambda s: module.register_forward_hook(lambda m, args, out: hook(s, out))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_act_x_grad_is_the_derivative_along_the_activation(family: str) -> None:
    """⟨h, ∂L/∂h⟩ is dL/ds at s = 1 of scaling the unit by s, for every unit."""
    model, batch = double(family), FAMILIES[family].batch()
    partition = by_head(model, family)
    check = untouched(model)
    scores = ActXGrad().measure(probe_of(model, partition, batch))
    check()
    path, width, _ = PROJECTIONS[family]

    def slope(unit) -> float:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        handle = unit(scale)
        loss = model(**batch).loss
        handle.remove()
        return abs(float(torch.autograd.grad(loss, scale)[0]))

    for component in partition:
        assert component.layer is not None
        if component.kind == "head":
            module = model.get_submodule(f"{component.layer}.{path}")
            unit = scaled_input(module, component.index * width, width)
        else:
            unit = scaled_output(model.get_submodule(component.layer))
        assert scores[component.name] == pytest.approx(slope(unit), rel=1e-4, abs=1e-9)


def test_errors_name_what_is_missing() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    partition = by_layer(model, LAYERS["bert"])
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    loss = lambda m, b: m(**{k: v for k, v in b.items() if k != "labels"}).logits.square().mean()  # noqa: E731
    check = untouched(model)
    with pytest.raises(DataError, match=r"labels.*found keys \['attention_mask', 'input_ids'\]"):
        ResidualDot().measure(probe_of(model, partition, unlabelled, loss))
    check()
    with pytest.raises(DataError, match="called 2 times"):
        ResidualDot().measure(probe_of(model, partition, batch, lambda m, b: loss(m, b) + loss(m, b)))
