"""LISA, BAdam, HFT, IST and gradual (un)freezing against literal transcriptions of their schedules."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from rgft.allocation.peers.badam import BAdam, blocks_of, steps_in_turn
from rgft.allocation.peers.freezing import AutoFreeze, GradualFreezing, GradualUnfreezing
from rgft.allocation.peers.hft import HFT
from rgft.allocation.peers.ist import IST
from rgft.allocation.peers.lisa import LISA
from rgft.allocation.random import RandomMask, generator
from rgft.errors import ConfigError


def layers_on(components: Any, on: Any) -> list[str]:
    """Layers of which everything is on; fails if one is partly on."""
    members: dict[str, list[bool]] = {}
    for c in components:
        if c.layer is not None:
            members.setdefault(c.layer, []).append(c.name in on)
    assert all(len(set(states)) == 1 for states in members.values())
    return [layer for layer, states in members.items() if states[0]]


def test_lisa_draws_gamma_layers_every_k_steps(make: Any) -> None:
    components = make.model(layers=6)
    policy = LISA(layers=2, every=5)
    for step in range(40):
        plan = policy.decide(make.situation(components, seed=3, step=step))
        rng = generator(3, step // 5, "lisa")
        keys = [rng.random() for _ in range(6)]
        wanted = sorted(range(6), key=lambda i: keys[i])[:2]
        assert layers_on(components, plan.active()) == [f"layers.{i}" for i in sorted(wanted)]
        assert plan.multipliers["embeddings"] == plan.multipliers["classifier"] == 1.0
        assert plan.cut == 0


def test_lisa_reaches_all_layers_alike_and_can_truncate(make: Any) -> None:
    components = make.model(layers=6)
    counts = dict.fromkeys((f"layers.{i}" for i in range(6)), 0)
    for step in range(600):
        plan = LISA(layers=1, every=1, outside="after").decide(make.situation(components, step=step))
        (layer,) = layers_on(components, plan.active())
        counts[layer] += 1
        assert plan.cut == int(layer[-1]) + 1
    # Binomial(600, 1/6): standard deviation 9.1.
    assert all(abs(n - 100) < 46 for n in counts.values()), counts


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_badam_goes_through_all_blocks_in_each_cycle(make: Any, order: str) -> None:
    components = make.model(layers=3)
    blocks = [["embeddings"], *([c.name for c in components if c.layer == f"layers.{i}"] for i in range(3))]
    blocks.append(["classifier"])
    policy = BAdam(every=4, order=order)
    cycles = []
    for cycle in range(4):
        visited = []
        for place in range(5):
            plans = [
                policy.decide(make.situation(components, seed=1, step=(cycle * 5 + place) * 4 + i)) for i in range(4)
            ]
            assert all(plan.same_effect(plans[0]) for plan in plans)
            visited.append(blocks.index(list(plans[0].active())))
        assert sorted(visited) == [0, 1, 2, 3, 4]
        cycles.append(visited)
    if order == "random":
        assert len({tuple(cycle) for cycle in cycles}) > 1
    else:
        assert cycles == [sorted(range(5), reverse=order == "descending")] * 4


def test_badam_beside_an_always_trained_head(make: Any) -> None:
    components = make.model(layers=2)
    policy = BAdam(every=1, order="ascending", always_on=("classifier",))
    seen = [policy.decide(make.situation(components, step=t)).active() for t in range(3)]
    assert all("classifier" in on for on in seen)
    assert seen[0] == ("embeddings", "classifier")
    assert policy.decide(make.situation(components, step=3)).active() == seen[0]


def test_badam_without_a_block_of_embeddings(make: Any) -> None:
    components = make.model(layers=2)
    policy = BAdam(every=1, order="ascending", embeddings=False, always_on=("classifier",))
    seen = [policy.decide(make.situation(components, step=step)).active() for step in range(4)]
    layers = [(*(c.name for c in components if c.layer == f"layers.{i}"), "classifier") for i in range(2)]
    assert seen == [*layers, *layers]


def test_hft_takes_half_of_every_layer(make: Any) -> None:
    components = make.model(layers=4, heads=2)
    draws = set()
    for step in range(0, 30, 10):
        on = HFT(every=10).active(make.situation(components, step=step))
        for layer in range(4):
            members = [c.name for c in components if c.layer == f"layers.{layer}"]
            assert sum(name in on for name in members) == len(members) / 2
        assert {"embeddings", "classifier"} <= on
        assert HFT(every=10).active(make.situation(components, step=step + 9)) == on
        draws.add(on)
    assert len(draws) == 3
    assert len({HFT().active(make.situation(components, step=s)) for s in range(0, 100, 10)}) == 1


def test_hft_with_odd_layers_is_half_over_the_model(make: Any) -> None:
    components = make.model(layers=4, heads=1)
    on = HFT().active(make.situation(components))
    sizes = [sum(c.name in on for c in components if c.layer == f"layers.{i}") for i in range(4)]
    assert sorted(sizes) == [1, 1, 2, 2]
    single = tuple(make.component(f"l{i}", i + 1, layer=f"l{i}") for i in range(6))
    assert len(HFT().active(make.situation(single))) == 3


def test_ist_samples_by_importance(make: Any) -> None:
    components = tuple(make.component(f"l{i}", i + 1, layer=f"l{i}") for i in range(4))
    scores = [6.0, 2.0, 1.0, -5.0]
    counts = dict.fromkeys((c.name for c in components), 0)
    draws = 3000
    for step in range(draws):
        (name,) = IST(fraction=0.25, uniform=0.2).active(make.situation(components, scores, step=step))
        counts[name] += 1
    for name, score in zip(counts, scores, strict=True):
        probability = 0.8 * max(0.0, score) / 9.0 + 0.2 / 4
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[name] - draws * probability) < 4.5 * deviation, (name, counts)


def test_ist_keeps_what_lies_outside(make: Any) -> None:
    components = make.model(layers=4)
    situation = make.situation(components, {c.name: 1.0 for c in components})
    for outside, always in (("all", {"embeddings", "classifier"}), ("after", {"classifier"})):
        on = IST(fraction=0.25, outside=outside).active(situation)
        assert {c.name for c in components if c.layer is None} & on == always
        assert len(layers_on(components, on)) == 1


def test_ist_draws_uniformly_before_it_has_looked_and_keeps_a_draw_for_as_long_as_asked(make: Any) -> None:
    components = tuple(make.component(f"l{i}", i + 1, layer=f"l{i}") for i in range(4))
    counts = dict.fromkeys((c.name for c in components), 0)
    for step in range(2000):
        (name,) = IST(fraction=0.25).active(make.situation(components, step=step))
        counts[name] += 1
        held = IST(fraction=0.25, every=5)
        assert held.active(make.situation(components, step=step)) == held.active(
            make.situation(components, step=step - step % 5)
        )
    # Binomial(2000, 1/4): standard deviation 19.4.
    assert all(abs(n - 500) < 90 for n in counts.values()), counts


@pytest.mark.parametrize(
    "policy", [LISA(layers=1, every=0.1), HFT(every=0.1), RandomMask(q=0.5, every=0.1)], ids=lambda p: p.name
)
def test_a_share_of_the_run_is_so_many_steps(make: Any, policy: Any) -> None:
    components, in_steps = make.model(layers=8), replace(policy, every=3)
    for step in range(60):
        situation = make.situation(components, step=step, total_steps=39)
        assert policy.active(situation) == in_steps.active(situation)
    short = [policy.active(make.situation(components, step=step, total_steps=7)) for step in range(12)]
    assert sum(a != b for a, b in pairwise(short)) >= 8


@pytest.mark.parametrize("make_policy", [LISA, HFT, IST, AutoFreeze, RandomMask])
def test_a_stretch_is_whole_steps_or_a_share(make: Any, make_policy: Any) -> None:
    for wrong in (0.0, -1, 1.5):
        with pytest.raises(ConfigError, match=r"every: expected a number of steps .* or a share of the run"):
            make_policy(every=wrong)
    with pytest.raises(ConfigError, match=r"policy\.every: .* the run's length is not known here; found the share 0.1"):
        LISA(every=0.1).active(make.situation(make.model(), step=3))


def test_badam_goes_through_as_many_cycles_as_asked(make: Any) -> None:
    components = make.model(layers=6)
    costs = make.costs(components, dw={c.name: 10.0 for c in components})
    policy = BAdam(cycles=2, order="ascending")

    def total(names: Any) -> float:
        return costs.step_flops(names, rows=1, tokens=1).total

    allowed = 40 * total([c.name for c in components])
    spent, step, seen = 0.0, 0, []
    while spent < allowed:
        on = policy.active(make.situation(components, step=step, total_steps=40, costs=costs))
        seen.append(on)
        spent, step = spent + total(on), step + 1
    assert step > 60
    starts = [on for before, on in pairwise([frozenset(), *seen]) if on != before]
    assert 16 <= len(starts) <= 18
    assert len(set(starts[:8])) == 8
    assert starts[8:16] == starts[:8]


def test_badam_counts_steps_that_the_data_have(make: Any) -> None:
    """Blocks cost so little that the data end first: 40 micro-batches, ten steps, over five blocks."""
    components = make.model(layers=3)
    costs = make.costs(components, dw={c.name: 10.0 for c in components})
    situation = make.situation(components, step=1, total_steps=10, costs=costs, batches=40, accumulation=4)
    assert steps_in_turn(situation, blocks_of(components)) == 10


def test_gradual_freezing_is_linear_in_the_run(make: Any) -> None:
    components = make.model(layers=5)
    for step in range(101):
        plan = GradualFreezing(keep=1, until=0.5).decide(make.situation(components, step=step, total_steps=100))
        frozen = min(4, int(4 * step / 50))
        assert plan.cut == (0 if frozen == 0 else frozen + 1)
        assert layers_on(components, plan.active()) == [f"layers.{i}" for i in range(frozen, 5)]
    with pytest.raises(ConfigError, match=r"policy\.steps"):
        GradualFreezing().decide(make.situation(components))


def test_gradual_unfreezing_is_over_at_a_share_of_the_run(make: Any) -> None:
    components = make.model(layers=3)
    policy = GradualUnfreezing(until=0.5)
    cuts = [policy.decide(make.situation(components, step=s, total_steps=24)).cut for s in range(24)]
    assert cuts == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, *[0] * 12]


def test_gradual_unfreezing_adds_a_layer_at_a_time(make: Any) -> None:
    components = make.model(layers=3)
    cuts = [GradualUnfreezing(every=10).decide(make.situation(components, step=s)).cut for s in range(0, 60, 5)]
    assert cuts == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0]
    assert GradualUnfreezing(every=10).decide(make.situation(components, step=5)).active() == ("classifier",)
