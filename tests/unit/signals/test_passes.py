"""Signals that run forward passes only: suppression, router_share, tuned_lens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rgft.components import Component, Partition
from rgft.errors import ConfigError, DataError
from rgft.signals import RouterShare, Suppression, TunedLens
from rgft.signals.suppression import contribution
from rgft.signals.tuned_lens import leave_one_out_errors
from tests.families import FAMILIES
from tests.unit.signals.hand_made import LAYERS, by_head, by_layer, double, part, probe_of, untouched


def loss_of(model: nn.Module, batch) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_suppressing_heads_scales_their_share_of_the_projected_context(family: str) -> None:
    model, batch = double(family), FAMILIES[family].batch()
    partition = by_head(model, family)
    check = untouched(model)
    scores = Suppression(factor=0.25).measure(probe_of(model, partition, batch))
    check()
    path = {"bert": "attention.output.dense", "gpt2": "attn.c_proj"}[family]
    for component in partition:
        if component.kind != "head":
            continue
        scale = torch.ones(32, dtype=torch.float64)
        scale[8 * component.index : 8 * component.index + 8] = 0.25
        module = model.get_submodule(f"{component.layer}.{path}")
        handle = module.register_forward_pre_hook(lambda m, args, scale=scale: (args[0] * scale,))
        damped = loss_of(model, batch)
        handle.remove()
        expected = damped - loss_of(model, batch)
        assert scores[component.name] == pytest.approx(expected, abs=1e-6 if family == "gpt2" else 1e-12)


def test_suppressing_a_layer_entirely_skips_it() -> None:
    model, batch = double("llama"), FAMILIES["llama"].batch()
    layers = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
    check = untouched(model)
    scores = Suppression(factor=0.0).measure(probe_of(model, by_layer(model, layers), batch))
    check()
    for position, layer in enumerate(layers):
        without = copy.deepcopy(model)
        del without.model.layers[position]
        without.config.num_hidden_layers -= 1
        # A cache would count the layers.
        skipped = loss_of(without, {**batch, "use_cache": False})
        assert scores[layer] == pytest.approx(skipped - loss_of(model, batch), abs=1e-6)


def test_suppressing_a_lora_pair_scales_its_update() -> None:
    model = FAMILIES["peft_lora"].build().double().eval()
    pairs: dict[str, list[str]] = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            pairs.setdefault(name.split(".lora_")[0], []).append(name)
            with torch.no_grad():
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    module, names = next(iter(pairs.items()))
    pair = Component(name=module, kind="adapter", slices=tuple(part(model, n) for n in names), depth=1)
    batch = FAMILIES["peft_lora"].batch()
    probe = probe_of(model, Partition(components=(pair,), layers=(), granularity="adapter"), batch)
    score = Suppression(factor=0.5).measure(probe)[module]
    layer = model.get_submodule(module)
    before = loss_of(model, batch)
    layer.scaling = {name: 0.5 * scale for name, scale in layer.scaling.items()}
    assert score == pytest.approx(loss_of(model, batch) - before, abs=1e-12)
    assert score != 0.0


def test_what_a_component_contributes_through() -> None:
    bert = double("bert")
    layer = LAYERS["bert"][0]

    def positions(*names: str, **sliced) -> list[int]:
        return contribution(bert, Component(name="c", kind="other", depth=1,
                                            slices=tuple(part(bert, f"{layer}.{n}") for n in names)))  # fmt: skip

    ffn = ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight", "output.dense.bias",
           "output.LayerNorm.weight", "output.LayerNorm.bias")  # fmt: skip
    assert positions(*ffn) == [2, 3]
    assert positions(*ffn[4:]) == [0, 1]
    block = Component(
        name="b", kind="ffn_block", depth=1,
        slices=(part(bert, f"{layer}.{ffn[0]}", 0, 0, 16), part(bert, f"{layer}.{ffn[2]}", 1, 0, 16)),
    )  # fmt: skip
    assert contribution(bert, block) == [1]


def test_suppression_restores_weights_when_the_loss_fails() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    calls = []

    def loss(model, batch):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return model(**batch).loss

    partition = by_head(model, "bert")
    check = untouched(model)
    with pytest.raises(RuntimeError, match="stop"):
        Suppression().measure(probe_of(model, partition, batch, loss))
    check()
    with pytest.raises(ConfigError, match="factor"):
        Suppression(factor=1.0)


def moe_partition(model: nn.Module) -> Partition:
    components = []
    for depth, layer in enumerate(LAYERS["mixtral"], 1):
        router = part(model, f"{layer}.mlp.gate.weight")
        components.append(Component(name=f"{layer}.router", kind="router", slices=(router,), depth=depth, layer=layer))
        for e in range(4):
            slices = tuple(
                part(model, f"{layer}.mlp.experts.{name}", 0, e, e + 1) for name in ("gate_up_proj", "down_proj")
            )
            components.append(
                Component(name=f"{layer}.expert.{e}", kind="expert", slices=slices, depth=depth, layer=layer, index=e)
            )
    return Partition(components=tuple(components), layers=LAYERS["mixtral"], granularity="block")


def test_router_share_counts_the_choices() -> None:
    # The experts' grouped product knows no float64.
    model, batch = double("mixtral").float(), FAMILIES["mixtral"].batch()
    loss_of(model, batch)  # the first call installs the model's own hooks
    check = untouched(model)
    scores = RouterShare().measure(probe_of(model, moe_partition(model), batch))
    check()
    out = model(**batch, output_router_logits=True)
    for layer, logits in zip(LAYERS["mixtral"], out.router_logits, strict=True):
        counts = [0] * 4
        for token in logits.reshape(-1, 4).tolist():
            for expert in sorted(range(4), key=lambda e: -token[e])[:2]:
                counts[expert] += 1
        for e in range(4):
            assert scores[f"{layer}.expert.{e}"] == pytest.approx(counts[e] / sum(counts))
    assert len(scores) == 8


class _Routed(nn.Module):
    """A router that returns logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.gate(x).softmax(-1)[:, :1] * self.experts(x)


def test_router_share_needs_k_where_the_router_returns_logits_only() -> None:
    torch.manual_seed(0)
    model, x = _Routed(), torch.randn(7, 3)
    partition = Partition(
        components=(
            Component(name="gate", kind="router", slices=(part(model, "gate.weight"),), depth=0),
            *(Component(name=f"e{e}", kind="expert", depth=0, index=e,
                        slices=(part(model, "experts.weight", 0, e, e + 1),)) for e in range(2)),
        ),
        layers=(), granularity="custom",
    )  # fmt: skip
    probe = probe_of(model, partition, x, lambda m, b: m(b).mean())
    with pytest.raises(DataError, match="k="):
        RouterShare().measure(probe)
    first = float((model.gate(x).argmax(-1) == 0).float().mean())
    assert RouterShare(k=1).measure(probe) == pytest.approx({"e0": first, "e1": 1 - first})


def refitted(x: torch.Tensor, y: torch.Tensor, ridge: float) -> list[float]:
    """Leaves each sample out in turn and fits intercept and weights anew, at the λ of all samples."""
    centred = x - x.mean(0)
    penalty = ridge * float(centred.square().sum()) / len(x)
    errors: list[float] = []
    for i in range(len(x)):
        keep = [j for j in range(len(x)) if j != i]
        mean_x, mean_y = x[keep].mean(0), y[keep].mean(0)
        a, b = x[keep] - mean_x, y[keep] - mean_y
        w = torch.linalg.solve(a.T @ a + penalty * torch.eye(x.shape[1], dtype=x.dtype), a.T @ b)
        errors.append(float((y[i] - mean_y - (x[i] - mean_x) @ w).square().sum()))
    return errors


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_leave_one_out_errors_equal_refitting() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64) + 3.0, torch.randn(9, 2, dtype=torch.float64) - 1.0
    assert leave_one_out_errors(x, y, ridge=0.7).tolist() == pytest.approx(refitted(x, y, 0.7), rel=1e-10)


def test_tuned_lens_pools_real_tokens_and_scores_layers_and_heads() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch(rows=8)
    partition = by_head(model, "bert")
    check = untouched(model)
    scores = TunedLens(ridge=0.5).measure(probe_of(model, partition, batch))
    check()
    assert set(scores) == set(partition.names)
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].double()
    targets = torch.eye(3, dtype=torch.float64)[batch["labels"]]
    for position, layer in enumerate(LAYERS["bert"]):
        hidden = out.hidden_states[position + 1]
        pooled = torch.stack([hidden[b, mask[b] == 1].mean(0) for b in range(8)])
        assert scores[f"{layer}.rest"] == pytest.approx(mean(refitted(pooled, targets, 0.5)), rel=1e-8)
    assert len({scores[f"{LAYERS['bert'][0]}.head.{h}"] for h in range(4)}) == 4


def test_tuned_lens_takes_tokens_as_samples_of_a_language_model() -> None:
    model, batch = double("llama"), FAMILIES["llama"].batch()
    layer = LAYERS["llama"][0]
    partition = by_layer(model, LAYERS["llama"])
    scores = TunedLens(samples=20).measure(probe_of(model, partition, batch))
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1][:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    targets = torch.eye(60, dtype=torch.float64)[labels[keep][:20]]
    assert scores[layer] == pytest.approx(mean(refitted(hidden[keep][:20], targets, 1.0)), rel=1e-8)


def test_tuned_lens_leaves_an_encoder_out_under_decoder_labels() -> None:
    model, batch = double("t5"), FAMILIES["t5"].batch()
    scores = TunedLens().measure(probe_of(model, by_layer(model, LAYERS["t5"]), batch))
    assert set(scores) == {"decoder.block.0", "decoder.block.1"}


def test_tuned_lens_refuses_too_small_a_batch_and_bad_settings() -> None:
    model = double("bert")
    partition = by_layer(model, LAYERS["bert"])
    with pytest.raises(DataError, match="at least 3 targets"):
        TunedLens().measure(probe_of(model, partition, FAMILIES["bert"].batch(rows=2)))
    with pytest.raises(ConfigError) as caught:
        TunedLens(ridge=0.0, samples=1)
    assert len(caught.value.problems) == 2
