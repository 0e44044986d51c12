"""Every registered stage, by name: purity, the cut, the unobserved rule, and errors in the settings."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from rgft.allocation import (
    MASKS,
    PERIODS,
    POLICIES,
    SCALINGS,
    depends_on_map,
    make_mask,
    make_period,
    make_policy,
    make_scaling,
)
from rgft.allocation.compose import Composed
from rgft.allocation.exploration import Exploring, Hysteresis
from rgft.allocation.scaling import Bounded, DecreaseRatio, MeanPreserved, Normalised
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan

SETTINGS: dict[str, dict[str, Any]] = {"threshold": {"tau": 0.5}}
TESTED_MASKS = sorted(set(MASKS) - {"budget"})


def policy_named(name: str, components: Any) -> Any:
    if name == "static":
        return make_policy(name, plan=UpdatePlan.all_on(tuple(c.name for c in components)))
    return make_policy(name, **SETTINGS.get(name, {}))


def situations(make: Any, components: Any) -> list[Any]:
    """None, some and all observed; with and without a plan in force."""
    rng = random.Random(1)
    costs = make.costs(components, {c.name: float(c.numel) for c in components})
    scores = {c.name: rng.uniform(-1.0, 3.0) for c in components}
    some = dict(list(scores.items())[::2])
    base = [make.situation(components, s, costs=costs, total_steps=50, step=7) for s in ({}, some, scores)]
    before = UpdatePlan(step=3, multipliers={c.name: float(i % 2) for i, c in enumerate(components)})
    return base + [replace(s, previous=before) for s in base]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_are_pure_and_their_cut_is_the_lowest_component_on(make: Any, name: str) -> None:
    components = make.model(layers=4)
    for situation in situations(make, components):
        plan = policy_named(name, components).decide(situation)
        assert plan == policy_named(name, components).decide(situation)
        assert plan.step == situation.step
        assert tuple(plan.multipliers) == tuple(c.name for c in components)
        assert plan.cut == min(c.depth for c in components if plan.is_on(c.name))
        assert 0 < len(plan.reason) < 80


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_without_observation_on_with_multiplier_1_if_the_map_matters(make: Any, name: str) -> None:
    components = make.model(layers=4)
    policy = policy_named(name, components)
    for situation in situations(make, components):
        plan = policy.decide(situation)
        if depends_on_map(policy):
            unseen = [c.name for c in components if not situation.error_map.is_observed(c.name)]
            if name == "autofreeze" and situation.previous is not None:
                continue  # what is frozen already stays so, observed or not
            if name == "ist":
                continue  # draws among layers that it has not looked at, too
            assert all(plan.multipliers[n] == 1.0 for n in unseen)
        else:
            empty = replace(situation, error_map=make.map(components, {}))
            assert plan == policy.decide(empty)


@pytest.mark.parametrize("name", TESTED_MASKS)
def test_masks_inside_a_composed_policy(make: Any, name: str) -> None:
    components = make.model(layers=4)
    for situation in situations(make, components):
        mask = make_mask(name, **SETTINGS.get(name, {}), margin=0.1, exploration=0.2)
        plan = Composed(scaling=Normalised(), mask=mask, always_on=("classifier",)).decide(situation)
        assert plan.is_on("classifier")
        assert plan == Composed(scaling=Normalised(), mask=mask, always_on=("classifier",)).decide(situation)
        unseen = [c.name for c in components if not situation.error_map.is_observed(c.name)]
        assert all(plan.multipliers[n] in (0.0, 1.0) for n in unseen)


@pytest.mark.parametrize("table", [SCALINGS, MASKS, PERIODS, POLICIES])
def test_names_are_those_of_the_classes_and_say_what_they_are(table: Any) -> None:
    for name, cls in table.items():
        assert cls.name == name
        assert cls.__doc__
        assert not cls.__doc__.startswith(f"{cls.__name__}(")  # what a dataclass without a docstring gets


def test_every_scaling_and_period_can_be_made() -> None:
    assert [make_scaling(name).name for name in SCALINGS] == list(SCALINGS)
    assert [make_period(name).name for name in PERIODS] == list(PERIODS)


def test_combinators_by_settings() -> None:
    plain = Normalised(by="mean", alpha=2.0)
    assert make_scaling("normalised", by="mean", alpha=2.0) == plain
    assert make_scaling("normalised", by="mean", alpha=2.0, f_max=3.0) == Bounded(scaling=plain, f_max=3.0)
    assert make_scaling("normalised", by="mean", alpha=2.0, preserve_mean=True, f_min=0.5) == MeanPreserved(
        scaling=plain, f_min=0.5
    )
    assert make_scaling("decrease_ratio", f_min=0.5, f_max=2.0) == DecreaseRatio(f_min=0.5, f_max=2.0)
    wrapped = make_mask("threshold", tau=1.0, margin=0.1, exploration=0.2, exploration_every=100)
    assert isinstance(wrapped, Exploring)
    assert isinstance(wrapped.mask, Hysteresis)


def test_all_problems_at_once_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        make_mask("threshold", taw=1.0, fracton=0.5)
    assert caught.value.problems == [
        "mask 'threshold': unknown setting 'taw'; nearest: tau",
        "mask 'threshold': unknown setting 'fracton'; known: tau",
        "mask 'threshold': the setting 'tau' has no default and must be given",
    ]
    with pytest.raises(ConfigError) as caught:
        make_policy("badm", evry=3, order="random")
    assert len(caught.value.problems) == 2
    assert "unknown name 'badm'; nearest: badam" in str(caught.value)
    assert "unknown setting 'evry'; nearest: every" in str(caught.value)
    with pytest.raises(ConfigError, match="it takes none"):
        make_scaling("uniform", alpha=1.0)
    with pytest.raises(ConfigError, match="known: every_step, proportional, ranked"):
        make_period("xyz")
    with pytest.raises(ConfigError, match="wrong type"):
        make_scaling("normalised", alpha="much")
