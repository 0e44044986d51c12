from __future__ import annotations

import pytest
import torch

from rgft.errors import ConfigError
from rgft.signals import Delta, LowRankMagnitude, Random, Uniform, WeightMagnitude
from tests.families import FAMILIES
from tests.unit.signals.hand_made import LAYERS, by_head, by_layer, double, probe_of, untouched


def flat(component, tensors) -> torch.Tensor:
    return torch.cat([s.of(tensors[s.parameter]).flatten() for s in component.slices])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("normalise", ["rms", "raw"])
def test_magnitude_and_delta_equal_the_formula(p: int, normalise) -> None:
    model = double("bert")
    weights = {name: w.detach() for name, w in model.named_parameters()}
    initial = {name: w + 0.01 * torch.randn_like(w) for name, w in weights.items()}
    partition = by_head(model, "bert")
    initials = {c.name: tuple(s.of(initial[s.parameter]) for s in c.slices) for c in partition}
    check = untouched(model)
    probe = probe_of(model, partition, None, initial=initials.get)
    magnitude, delta = (cls(p=p, normalise=normalise).measure(probe) for cls in (WeightMagnitude, Delta))
    check()
    for c in partition:
        size = c.numel ** (1 / p) if normalise == "rms" else 1.0
        now, then = flat(c, weights), flat(c, initial)
        assert magnitude[c.name] == pytest.approx(float(now.norm(p)) / size, rel=1e-10)
        assert delta[c.name] == pytest.approx(float((now - then).norm(p)) / size, rel=1e-10)


def test_delta_needs_the_initial_weights() -> None:
    model = double("bert")
    partition = by_layer(model, LAYERS["bert"])
    with pytest.raises(ConfigError, match="initial weights"):
        Delta().measure(probe_of(model, partition, None))
    assert Delta().measure(probe_of(model, partition, None, initial=lambda name: None)) == {}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_low_rank_magnitude_decomposes_the_whole_matrix_then_slices(family: str) -> None:
    model = double(family)
    partition = by_head(model, family)
    # The other components' slices make the matrices whole.
    scores = LowRankMagnitude(rank=3).measure(probe_of(model, partition, None))
    for c in partition:
        pieces = []
        for s in c.slices:
            if len(s.shape) == 2:
                u, values, vh = torch.linalg.svd(model.get_parameter(s.parameter).detach())
                pieces.append(s.of((u[:, :3] * values[:3]) @ vh[:3]).flatten())
        assert scores[c.name] == pytest.approx(float(torch.cat(pieces).abs().mean()), rel=1e-8)


def test_low_rank_magnitude_of_full_rank_is_magnitude_and_treats_experts_one_by_one() -> None:
    model = double("mixtral")
    partition = by_layer(model, LAYERS["mixtral"])
    layer = partition[LAYERS["mixtral"][0]]
    full = LowRankMagnitude(rank=1000, reduction="sum").measure(probe_of(model, partition, None))
    matrices = [model.get_parameter(s.parameter).detach() for s in layer.slices if len(s.shape) > 1]
    assert full[layer.name] == pytest.approx(sum(float(m.abs().sum()) for m in matrices), rel=1e-8)
    one = LowRankMagnitude(rank=1, reduction="sum").measure(probe_of(model, partition, None))
    expected = 0.0
    for stack in matrices:
        for m in stack if stack.dim() == 3 else [stack]:
            u, s, vh = torch.linalg.svd(m, full_matrices=False)
            expected += float((s[0] * torch.outer(u[:, 0], vh[0])).abs().sum())
    assert one[layer.name] == pytest.approx(expected, rel=1e-8)


def test_low_rank_magnitude_flattens_kernels() -> None:
    model = FAMILIES["conv_net"].build().double()
    scores = LowRankMagnitude(rank=2).measure(probe_of(model, by_layer(model, ("network.0",)), None))
    u, s, vh = torch.linalg.svd(model.network[0].weight.detach().reshape(8, 27), full_matrices=False)
    assert scores["network.0"] == pytest.approx(float(((u[:, :2] * s[:2]) @ vh[:2]).abs().mean()), rel=1e-8)


def test_random_depends_on_seed_and_step_alone() -> None:
    model = double("bert")
    partition = by_layer(model, LAYERS["bert"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = {
        (seed, step): Random(seed=seed).measure(probe_of(model, partition, None, step=step))
        for seed in (0, 1) for step in (0, 1)
    }  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert Random(seed=1).measure(probe_of(model, partition, None, step=1)) == draws[1, 1]
    values = [value for draw in draws.values() for value in draw.values()]
    assert len(set(values)) == len(values) == 16
    assert all(0.0 <= value < 1.0 for value in values)
    assert set(draws[0, 0]) == set(partition.names)


def test_uniform_is_one_everywhere() -> None:
    model = double("bert")
    partition = by_layer(model, LAYERS["bert"])
    assert Uniform().measure(probe_of(model, partition, None)) == dict.fromkeys(partition.names, 1.0)
