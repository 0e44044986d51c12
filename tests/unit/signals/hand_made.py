"""Partitions and probes made by hand, so that signals are tested apart from how models are split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.signals import Probe
from tests.families import FAMILIES, loss_of

LAYERS = {
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
    "mixtral": ("model.layers.0", "model.layers.1"),
    "t5": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    "torch_transformer_encoder": ("encoder.layers.0", "encoder.layers.1"),
}


def part(model: nn.Module, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> ParameterSlice:
    return ParameterSlice(parameter=name, shape=tuple(model.get_parameter(name).shape), dim=dim, start=start, stop=stop)


def by_layer(model: nn.Module, layers: tuple[str, ...]) -> Partition:
    """One component per layer, `before` and `after` the layers."""
    owned: dict[str, list[str]] = {"before": [], **{layer: [] for layer in layers}, "after": []}
    reached = False
    for name, _ in model.named_parameters():
        layer = next((layer for layer in layers if name.startswith(layer + ".")), None)
        reached = reached or layer is not None
        owned[layer or ("after" if reached else "before")].append(name)
    components = tuple(
        Component(
            name=name, kind="layer" if name in layers else "other", depth=depth, layer=name if name in layers else None,
            slices=tuple(part(model, owner) for owner in names),
        )
        for depth, (name, names) in enumerate(owned.items())
        if names
    )  # fmt: skip
    return Partition(components=components, layers=layers, granularity="custom")


def bert_heads(model: nn.Module) -> Iterable[Component]:
    """The four heads of each layer and the rest of the layer, all of width 32."""
    for depth, layer in enumerate(LAYERS["bert"], 1):
        attention = f"{layer}.attention"
        for head in range(4):
            rows = [(f"{attention}.self.{name}.{kind}", 0) for name in ("query", "key", "value")
                    for kind in ("weight", "bias")]  # fmt: skip
            yield _head(model, layer, depth, head, [*rows, (f"{attention}.output.dense.weight", 1)], 8)
        yield _rest(model, layer, depth, skip=(".query", ".key", ".value", "attention.output.dense.weight"))


def llama_heads(model: nn.Module) -> Iterable[Component]:
    """Two key/value groups of two query heads each: 16 rows of q, 8 of k and v, 16 columns of o."""
    for depth, layer in enumerate(LAYERS["llama"], 1):
        for group in range(2):
            slices = tuple(
                part(model, f"{layer}.self_attn.{name}.weight", dim, group * size, (group + 1) * size)
                for name, dim, size in (("q_proj", 0, 16), ("k_proj", 0, 8), ("v_proj", 0, 8), ("o_proj", 1, 16))
            )
            yield Component(
                name=f"{layer}.head.{group}", kind="head", slices=slices, depth=depth, layer=layer, index=group
            )
        yield _rest(model, layer, depth, skip=("self_attn",))


def gpt2_heads(model: nn.Module) -> Iterable[Component]:
    """Conv1D: q, k and v are three column ranges of c_attn, the context meets rows of c_proj."""
    for depth, layer in enumerate(LAYERS["gpt2"], 1):
        for head in range(4):
            fused = [part(model, f"{layer}.attn.c_attn.weight", 1, 32 * i + 8 * head, 32 * i + 8 * head + 8)
                     for i in range(3)]  # fmt: skip
            out = part(model, f"{layer}.attn.c_proj.weight", 0, 8 * head, 8 * head + 8)
            yield Component(
                name=f"{layer}.head.{head}", kind="head", slices=(*fused, out), depth=depth, layer=layer, index=head
            )
        yield _rest(model, layer, depth, skip=("attn.c_attn.weight", "attn.c_proj.weight"))


def _head(model: nn.Module, layer: str, depth: int, head: int, names: list[tuple[str, int]], size: int) -> Component:
    slices = tuple(part(model, name, dim, head * size, (head + 1) * size) for name, dim in names)
    return Component(name=f"{layer}.head.{head}", kind="head", slices=slices, depth=depth, layer=layer, index=head)


def _rest(model: nn.Module, layer: str, depth: int, skip: tuple[str, ...]) -> Component:
    names = [name for name, _ in model.named_parameters() if name.startswith(layer + ".")]
    slices = tuple(part(model, name) for name in names if not any(s in name for s in skip))
    return Component(name=f"{layer}.rest", kind="rest", slices=slices, depth=depth, layer=layer)


HEADS: dict[str, Callable[[nn.Module], Iterable[Component]]] = {
    "bert": bert_heads, "llama": llama_heads, "gpt2": gpt2_heads,
}  # fmt: skip


def by_head(model: nn.Module, family: str) -> Partition:
    return Partition(components=tuple(HEADS[family](model)), layers=LAYERS[family], granularity="head")


def double(family: str, seed: int = 0) -> nn.Module:
    """A float64 model in eval mode."""
    return FAMILIES[family].build(seed).double().eval()


def probe_of(
    model: nn.Module, partition: Partition, batch: Any, loss: Callable[[nn.Module, Any], Tensor] = loss_of, **more: Any
) -> Probe:
    """Whole parameters are the model's own; slices are detached views, which share memory and get no gradient."""
    parameters = dict(model.named_parameters())
    return Probe(
        model=model, partition=partition, batch=batch, loss=loss,
        parameters={
            c.name: tuple(
                parameters[s.parameter] if s.is_whole else s.of(parameters[s.parameter].detach()) for s in c.slices
            )
            for c in partition
        },
        **more,
    )  # fmt: skip


def gradients(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The gradient of every parameter that the loss depends on."""
    named = list(model.named_parameters())
    found = torch.autograd.grad(loss_of(model, batch), [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


def untouched(model: nn.Module) -> Callable[[], None]:
    """Call it later: asserts that weights, flags and hooks are as now, and that there are no gradients."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def check() -> None:
        for name, p in model.named_parameters():
            assert p.grad is None, name
            assert torch.equal(p, weights[name]), name
            assert p.requires_grad == flags[name], name
            assert not p._post_accumulate_grad_hooks, name
        assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    return check
