"""Signals on models split by `partition` and bound to view parameters, over the families."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rgft.execution.probing import still
from rgft.execution.views import bind
from rgft.partition import partition
from rgft.signals import (
    SIGNALS,
    ActXGrad,
    Fisher,
    GeneralisingDecrease,
    GradNorm,
    LowRankMagnitude,
    Probe,
    ResidualDot,
    Suppression,
    make,
    sketched_measure,
)
from tests.families import FAMILIES, loss_of

SPLIT = ["bert", "gpt2", "llama", "t5", "mixtral", "torch_transformer_encoder", "phi3"]


def bound_probe(family: str, granularity="head", **more):
    model = FAMILIES[family].build().eval()
    binding = bind(model, partition(model, granularity, ffn_blocks=2))
    probe = Probe(
        model=model, partition=binding.partition, parameters=binding.parameters, batch=FAMILIES[family].batch(),
        loss=loss_of, **more,
    )  # fmt: skip
    return model, binding, probe


@pytest.mark.parametrize("family", SPLIT)
def test_views_give_the_gradients_of_the_plain_model(family: str) -> None:
    model, binding, probe = bound_probe(family)
    plain = FAMILIES[family].build().eval()
    named = dict(plain.named_parameters())
    loss_of(plain, probe.batch).backward()
    with still(model, binding):
        found = Fisher(reduction="sum").measure(probe)
    assert all(p.grad is None for p in model.parameters())
    for component in binding.partition:
        gradients = [s.of(g) for s in component.slices if (g := named[s.parameter].grad) is not None]
        if gradients:
            expected = sum(float(g.double().square().sum()) for g in gradients)
            assert found[component.name] == pytest.approx(expected, rel=1e-3, abs=1e-12), component.name
    assert len(found) >= len([c for c in binding.partition if c.kind == "head"])


@pytest.mark.parametrize("family", SPLIT)
def test_sketches_of_bound_heads_and_neuron_blocks(family: str) -> None:
    model, binding, probe = bound_probe(family)
    steps = {name: tuple(torch.full_like(p, 1e-3) - p.detach() * 0.1 for p in parts)
             for name, parts in binding.parameters.items()}  # fmt: skip
    probe = Probe(**{**probe.__dict__, "update": steps.get})
    with still(model, binding):
        for signal in (GradNorm(), GeneralisingDecrease()):
            exact = signal.measure(probe)
            found = sketched_measure(probe, signal, signs=3000)
            assert set(found.scores) == set(exact)
            for name, score in exact.items():
                error = found.standard_errors.get(name, 0.0)
                assert abs(found.scores[name] - score) <= 5 * error + 1e-4 * abs(score) + 1e-9, (name, signal)
            # nn.MultiheadAttention calls none of its projections, so its heads are exact.
            sketched = {c.kind for c in binding.partition if found.standard_errors.get(c.name)}
            assert ("ffn_block" if family == "torch_transformer_encoder" else "head") in sketched


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "phi3"])
def test_every_head_and_everything_else_in_a_layer_has_a_residual_and_nothing_outside(family: str) -> None:
    model, binding, probe = bound_probe(family)
    heads = [c for c in binding.partition if c.kind == "head"]
    with still(model, binding):
        scores = ResidualDot(mode="signed").measure(probe)
    assert {c.name for c in heads} <= set(scores)
    for component in binding.partition:
        assert (component.name in scores) == (component.layer is not None)


def test_every_signal_on_every_family_moves_nothing() -> None:
    for family in FAMILIES:
        granularity = "adapter" if family.startswith("peft") else "head"
        model, binding, probe = bound_probe(family, granularity)
        probe = Probe(
            **{
                **probe.__dict__,
                "update": lambda name, b=binding: tuple(p.detach() for p in b.parameters[name]),
                "initial": lambda name, b=binding: tuple(p.detach() + 1.0 for p in b.parameters[name]),
            }
        )
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = torch.get_rng_state()
        with still(model, binding):
            for name in SIGNALS:
                scores = make(name).measure(probe)
                assert set(scores) <= set(binding.partition.names), (family, name)
                assert all(math.isfinite(v) for v in scores.values()), (family, name)
                # A network without layers has no layer outputs; only experts have a share.
                if name not in ("router_share", "tuned_lens", "residual_dot", "act_x_grad"):
                    assert scores, (family, name)
                assert all(p.grad is None for p in model.parameters()), (family, name)
                assert all(p.requires_grad for _, parts in binding for p in parts), (family, name)
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items()), family
        assert torch.equal(state, torch.get_rng_state())


def test_whole_matrices_are_assembled_from_views() -> None:
    _, binding, probe = bound_probe("llama")
    plain: nn.Module = FAMILIES["llama"].build()
    scores = LowRankMagnitude(rank=2).measure(probe)
    head = next(c for c in binding.partition if c.kind == "head")
    pieces = []
    for s in head.slices:
        if len(s.shape) == 2:
            u, values, vh = torch.linalg.svd(plain.get_parameter(s.parameter).detach())
            pieces.append(s.of((u[:, :2] * values[:2]) @ vh[:2]).flatten())
    assert scores[head.name] == pytest.approx(float(torch.cat(pieces).abs().mean()), rel=1e-4)


def test_suppressed_views_are_seen_by_the_model_and_restored() -> None:
    model, binding, probe = bound_probe("bert")
    with still(model, binding):
        scores = Suppression(factor=0.0).measure(probe)
        again = Suppression(factor=0.0).measure(probe)
    assert scores == again
    assert all(scores[c.name] != 0.0 for c in binding.partition if c.kind in ("head", "ffn_block"))


def test_act_x_grad_needs_no_gradient_of_weights_and_keeps_flags() -> None:
    model, binding, probe = bound_probe("bert")
    off = binding.partition.names[3]
    for p in binding.parameters[off]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    ActXGrad().measure(probe)
    assert flags == [p.requires_grad for p in model.parameters()]
