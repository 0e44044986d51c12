"""Forms of components: which parts they have, what is trained of them, and what a state holds."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from rgft.execution.low_rank import LowRank
from rgft.execution.pair_set import first_values
from rgft.execution.pair_sites import find_sites
from rgft.execution.views import bind
from rgft.partition import partition
from tests.families import FAMILIES

RANK = 2


def attached(name: str, granularity: Any, *, freezes_others: bool = False) -> tuple[nn.Module, LowRank]:
    model = FAMILIES[name].build()
    parts = partition(model, granularity, ffn_blocks=2)
    sites = find_sites(model, parts, {c.name for c in parts if c.layer is not None}, rank=RANK)
    binding = bind(model, parts)
    low_rank = LowRank(model, binding, sites, rank=RANK, alpha=4.0, freezes_others=freezes_others, seed=0)
    low_rank.begin(frozenset())
    return model, low_rank


@pytest.mark.parametrize("granularity", ["layer", "block", "head"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "mixtral", "torch_transformer_encoder"])
def test_sites_are_linear_weights_that_are_called(name: str, granularity: str) -> None:
    family = FAMILIES[name]
    model, low_rank = attached(name, granularity)
    called: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model.train()
    model(**family.batch())
    for sites in low_rank.sites.values():
        for site in sites:
            module = model.get_submodule(site.module)
            assert site.module in called
            assert type(module).__name__ in ("Linear", "Conv1D")
            a, b = first_values(site, RANK, module.weight, seed=0)
            assert a.shape == (RANK, site.inputs)
            assert b.shape == (site.outputs, RANK)
            slices = 1.0 if site.part.is_whole else site.part.fraction
            assert site.inputs * site.outputs == slices * site.part.shape[0] * site.part.shape[1]


def test_packed_projections_have_no_pair() -> None:
    """nn.MultiheadAttention reads the weight of its output projection without calling it."""
    _, low_rank = attached("torch_transformer_encoder", "layer")
    modules = {site.module.rpartition(".")[2] for sites in low_rank.sites.values() for site in sites}
    assert modules == {"linear1", "linear2"}


@pytest.mark.parametrize("freezes_others", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_parts_hold_each_parameter_once_and_go_on_by_form(granularity: str, freezes_others: bool) -> None:
    _, low_rank = attached("gpt2", granularity, freezes_others=freezes_others)
    binding, names = low_rank._binding, low_rank._binding.partition.names
    held = Counter(id(p) for parameters in low_rank.parts.values() for p in parameters)
    assert set(held.values()) == {1}
    assert set(held) == {id(p) for parameters in low_rank.held.values() for p in parameters}
    everything = {id(p) for _, parameters in binding for p in parameters}
    pairs = {id(p) for found in low_rank.pairs.values() for p in found}
    paired_weights = {id(p) for name in low_rank.sites for p in low_rank.parts[low_rank.weight_part(name)]}
    others = {id(p) for name in low_rank.sites for p in low_rank.parts[name]}

    def on() -> set[int]:
        return {id(p) for part in low_rank.parts_on(names) for p in low_rank.parts[part]}

    assert on() == everything
    low_rank.take_forms(frozenset(low_rank.sites), frozenset(names))
    assert on() == (everything | pairs) - paired_weights - (others if freezes_others else set())
    shown = dict(low_rank.model.named_parameters())
    for component in low_rank.as_trained:
        trained = low_rank.trained[component.name]
        assert len(component.slices) == len(trained)
        for part, parameter in zip(component.slices, trained, strict=True):
            assert part.numel == parameter.numel()
            if id(parameter) in pairs:
                assert shown[part.parameter] is parameter


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_state_restores_pairs_weights_and_forms_to_the_bit(granularity: str) -> None:
    model, low_rank = attached("llama", granularity)
    names = frozenset(low_rank._binding.partition.names)
    some = frozenset(list(low_rank.sites)[1:])
    low_rank.take_forms(some, names)
    with torch.no_grad():
        for pairs in low_rank.pairs.values():
            for pair in pairs:
                pair.add_(torch.randn(pair.shape, generator=torch.Generator().manual_seed(1)))
    held = {name: [p.detach().clone() for p in parameters] for name, parameters in low_rank.held.items()}
    plain, state = copy.deepcopy(model.state_dict()), copy.deepcopy(low_rank.state_dict(values=True))
    assert set(state["weights"]) == some

    other, fresh = attached("llama", granularity)
    other.load_state_dict(plain)
    assert not all(torch.equal(a, b) for n in some for a, b in zip(fresh.held[n], held[n], strict=True))
    fresh.load_state_dict(state, values=True)
    assert (fresh.in_form, fresh.running) == (low_rank.in_form, low_rank.running)
    assert all(torch.equal(a, b) for n in held for a, b in zip(fresh.held[n], held[n], strict=True))
    batch = FAMILIES["llama"].batch()
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)


def test_values_depend_on_the_place_alone_not_on_the_order() -> None:
    model = FAMILIES["bert"].build()
    parts = partition(model)
    layers = [c.name for c in parts if c.layer is not None]
    both = find_sites(model, parts, layers, rank=RANK)
    last = find_sites(model, parts, layers[-1:], rank=RANK)
    for left, right in zip(both[layers[-1]], last[layers[-1]], strict=True):
        weight = model.get_submodule(left.module).weight
        assert torch.equal(first_values(left, RANK, weight, seed=3)[0], first_values(right, RANK, weight, seed=3)[0])
        assert float(first_values(left, RANK, weight, seed=3)[0].abs().max()) <= left.inputs**-0.5
