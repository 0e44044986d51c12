from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.compose import Composed
from rgft.allocation.exploration import Hysteresis
from rgft.allocation.periods import Proportional
from rgft.allocation.random import RandomMask
from rgft.allocation.scaling import GradientNormalised, MeanPreserved, Normalised
from rgft.allocation.selection import depends_on_map
from rgft.allocation.threshold import TargetSparsity, Threshold, TopFraction
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


@given(data=st.data(), fraction=st.sampled_from([0.1, 0.4, 0.8]))
def test_the_plan_holds_scaling_mask_and_period(make: Any, data: Any, fraction: float) -> None:
    components = make.model(layers=3)
    scores = data.draw(st.lists(st.floats(0.0, 9.0), min_size=len(components), max_size=len(components)))
    situation = make.situation(components, scores, step=17)
    mask, scaling, period = TopFraction(fraction=fraction), Normalised(alpha=2.0), Proportional()
    plan = Composed(scaling=scaling, mask=mask, period=period).decide(situation)
    on, f, n = mask.active(situation), scaling.multipliers(situation), period.periods(situation)
    assert plan.step == 17
    assert plan.multipliers == {c.name: f[c.name] if c.name in on else 0.0 for c in components}
    assert plan.periods == {name: k for name, k in n.items() if k > 1 and name in on}
    assert plan.cut == min(c.depth for c in components if c.name in on)
    assert Composed(scaling=scaling, mask=mask, period=period).decide(situation) == plan
    assert plan.reason == f"normalised + top_fraction + proportional: {len(on)} of {len(components)} on"


def test_nothing_said_is_full_fine_tuning(make: Any) -> None:
    components = make.model()
    plan = Composed().decide(make.situation(components, [0.0] * len(components)))
    assert plan.same_effect(UpdatePlan.all_on(tuple(c.name for c in components)))


def test_always_on_by_kind_and_name_is_no_candidate(make: Any) -> None:
    components = make.model(layers=2, heads=2)
    scores = {c.name: -1.0 if c.kind == "classifier" else float(i) for i, c in enumerate(components)}
    situation = make.situation(components, scores)
    policy = Composed(mask=TopFraction(fraction=0.5), always_on=("classifier", "layers.0.ffn"))
    on = policy.decide(situation).active()
    others = [c.name for c in components if c.name not in ("classifier", "layers.0.ffn")]
    assert {"classifier", "layers.0.ffn"} <= set(on)
    assert len(set(on) & set(others)) == len(others) / 2


def test_a_mask_that_prices_plans_sees_every_component(make: Any) -> None:
    components = make.flat(6)
    costs = make.costs(components, dict.fromkeys((c.name for c in components), 20.0))
    policy = Composed(mask=RandomMask(q=1.0, by="flops"), always_on=("c5",))
    assert len(policy.decide(make.situation(components, costs=costs)).active()) == 6


def test_unknown_always_on_is_reported_with_the_nearest_names(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Composed(mask=TopFraction(), always_on=("clasifier", "layers.0.fnn", "embedding")).decide(
            make.situation(make.model())
        )
    assert len(caught.value.problems) == 2
    assert "'clasifier'; nearest: classifier" in str(caught.value)
    assert "layers.0.ffn" in str(caught.value)


def test_layer_names_match_whole(make: Any) -> None:
    components = tuple(make.component(f"layers.{i}", i, layer=f"layers.{i}") for i in range(12))
    plan = Composed(mask=Threshold(tau=1.0), always_on=("layers.1",)).decide(make.situation(components, [0.0] * 12))
    assert plan.active() == ("layers.1",)


def test_off_multiplier_leaves_nothing_off_but_hysteresis_knows(make: Any) -> None:
    components = make.flat(4)
    policy = Composed(mask=Hysteresis(mask=TopFraction(fraction=0.5), margin=0.2), off_multiplier=0.01)
    first = policy.decide(make.situation(components, [1.0, 2.0, 3.0, 2.9]))
    assert first.multipliers == {"c0": 0.01, "c1": 0.01, "c2": 1.0, "c3": 1.0}
    assert first.cut == 0
    held = policy.decide(make.situation(components, [1.0, 3.1, 3.0, 2.9], previous=first))
    assert held.multipliers == first.multipliers
    with pytest.raises(ConfigError, match="off_multiplier"):
        Composed(off_multiplier=1.0)


def test_mean_is_preserved_over_what_is_on(make: Any) -> None:
    components = make.flat(6)
    situation = make.situation(components, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    policy = Composed(scaling=MeanPreserved(scaling=Normalised(alpha=3.0)), mask=TopFraction(fraction=0.5))
    on = [f for f in policy.decide(situation).multipliers.values() if f > 0]
    assert len(on) == 3
    assert sum(on) / 3 == pytest.approx(1.0)


def test_when_nothing_passes_the_best_stays_on_and_the_reason_says_so(make: Any) -> None:
    plan = Composed(mask=Threshold(tau=99.0)).decide(make.situation(make.flat(4), [1.0, 3.0, 2.0, 0.0]))
    assert plan.active() == ("c1",)
    assert plan.cut == 1
    assert "nothing passed" in plan.reason


def test_no_absorbing_state(make: Any) -> None:
    components = make.flat(4)
    policy = Composed(mask=TopFraction(fraction=0.5))
    first = policy.decide(make.situation(components, [4.0, 3.0, 2.0, 1.0]))
    later = policy.decide(make.situation(components, [1.0, 2.0, 3.0, 4.0], previous=first))
    assert set(first.active()).isdisjoint(later.active())


def test_proposal_a_in_ten_lines(make: Any) -> None:
    components = make.model(layers=2, heads=4)
    scores = {c.name: float((i * 5) % 7) for i, c in enumerate(components) if c.layer}
    policy = Composed(
        scaling=GradientNormalised(gamma=1.0), mask=TargetSparsity(fraction=0.5), always_on=("embedding", "classifier")
    )
    plan = policy.decide(make.situation(components, scores, gradient_norm_squared=2.0))
    for layer in ("layers.0", "layers.1"):
        members = [c.name for c in components if c.layer == layer]
        kept = sorted(members, key=lambda name: (scores[name], members.index(name)))[len(members) // 2 :]
        for name in members:
            assert plan.multipliers[name] == pytest.approx(1 + scores[name] / 2.0 if name in kept else 0.0)
    assert plan.multipliers["embeddings"] == plan.multipliers["classifier"] == 1.0


def test_depends_on_map(make: Any) -> None:
    assert not depends_on_map(Composed())
    assert not depends_on_map(Composed(mask=RandomMask()))
    assert depends_on_map(Composed(scaling=MeanPreserved(scaling=Normalised())))
    assert depends_on_map(Composed(mask=Hysteresis(mask=Threshold(tau=1.0))))
    fresh = make.situation(make.flat(5), [1.0] * 5)
    policy = Composed(mask=RandomMask(q=0.4))
    assert policy.decide(fresh) == policy.decide(replace(fresh, error_map=make.map(fresh.components, [9.0] * 5)))
