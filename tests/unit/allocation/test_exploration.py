from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.exploration import Exploring, Hysteresis, steadied
from rgft.allocation.random import RandomMask
from rgft.allocation.threshold import Threshold, TopFraction
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


def plan(situation: Any, on: frozenset[str]) -> UpdatePlan:
    return UpdatePlan(
        step=situation.step, multipliers={c.name: float(c.name in on) for c in situation.components}
    )  # fmt: skip


def follow(mask: Any, situations: list[Any]) -> list[frozenset[str]]:
    """Decisions in a row, each seeing the plan before it."""
    previous, decisions = None, []
    for situation in situations:
        on = mask.active(replace(situation, previous=previous))
        previous = plan(situation, on)
        decisions.append(on)
    return decisions


def changes(decisions: list[frozenset[str]]) -> int:
    return sum(len(a ^ b) for a, b in itertools.pairwise(decisions))


@pytest.mark.parametrize("inner", [TopFraction(fraction=0.5), Threshold(tau=1.0)])
def test_hysteresis_stops_flapping(make: Any, inner: Any) -> None:
    components = make.flat(4)
    noisy = [
        make.situation(components, [1.0 + s, 1.0 - s, 3.0, 0.1], step=t)
        for t, s in enumerate([0.02, -0.02] * 10, start=1)
    ]
    assert changes(follow(inner, noisy)) >= 38
    assert changes(follow(Hysteresis(mask=inner, margin=0.1), noisy)) <= 1


def test_a_clear_change_passes_at_once_and_sparsity_stays_exact(make: Any) -> None:
    components = make.flat(4)
    situations = [make.situation(components, s, step=t) for t, s in enumerate([[2, 1.8, 1, 1], [2, 1.8, 3, 1]], 1)]
    assert follow(Hysteresis(mask=TopFraction(fraction=0.5), margin=0.1), situations) == [{"c0", "c1"}, {"c0", "c2"}]


def test_the_margin_is_relative_and_works_below_zero(make: Any) -> None:
    components = make.flat(2)
    mask = Hysteresis(mask=TopFraction(fraction=0.5), margin=0.5)
    held = [make.situation(components, s, step=t) for t, s in enumerate([[-1.0, -2.0], [-1.0, -0.6]], 1)]
    assert follow(mask, held) == [{"c0"}, {"c0"}]
    passed = [make.situation(components, s, step=t) for t, s in enumerate([[-1.0, -2.0], [-1.0, -0.4]], 1)]
    assert follow(mask, passed) == [{"c0"}, {"c1"}]


def test_settle_follows_small_lasting_differences_once_per_period(make: Any) -> None:
    components = make.flat(2)
    situations = [make.situation(components, [1.0, 1.05 if t > 1 else 0.9], step=t) for t in range(1, 12)]
    decisions = follow(Hysteresis(mask=TopFraction(fraction=0.5), margin=0.2, settle=5), situations)
    assert decisions == [{"c0"}] * 4 + [{"c1"}] * 7


@given(
    share=st.sampled_from([0.1, 0.2, 1 / 3, 0.5, 0.7, 1.0]), start=st.integers(0, 50), every=st.sampled_from([1, 100])
)  # fmt: skip
def test_exploration_visits_every_off_component(make: Any, share: float, start: int, every: int) -> None:
    components = make.flat(12)
    mask = Exploring(mask=TopFraction(fraction=0.25), share=share, every=every)
    window = math.ceil(round(1 / share, 9))
    seen: set[str] = set()
    extra = 0
    for decision in range(start, start + window):
        scores = [float((i * 7 + decision) % 12) for i in range(12)]  # what is on changes all the time
        situation = make.situation(components, scores, step=decision * every)
        on = mask.active(situation)
        assert TopFraction(fraction=0.25).active(situation) <= on
        extra += len(on) - 3
        seen |= on
    assert seen == {c.name for c in components}
    assert extra <= 12


def test_exploration_can_keep_the_cut(make: Any) -> None:
    components = make.flat(10)
    scores = [0.0] * 6 + [5.0, 0.0, 0.0, 5.0]
    for step in range(10):
        situation = make.situation(components, scores, step=step)
        on = Exploring(mask=TopFraction(fraction=0.2), share=0.1, keep_cut=True).active(situation)
        assert on == {"c6", "c9"} | ({f"c{step}"} if step >= 6 else set())


def test_candidates_only_is_that_of_the_inner_mask() -> None:
    assert steadied(TopFraction(), margin=0.1, exploration=0.2).candidates_only  # type: ignore[attr-defined]
    assert not steadied(RandomMask(by="flops"), exploration=0.2).candidates_only  # type: ignore[attr-defined]


def test_steadied_wraps_only_when_asked() -> None:
    mask = TopFraction()
    assert steadied(mask) is mask
    both = steadied(mask, margin=0.1, settle=7, exploration=0.2, every=3)
    assert both == Exploring(mask=Hysteresis(mask=mask, margin=0.1, settle=7), share=0.2, every=3)
    with pytest.raises(ConfigError, match="without a margin"):
        steadied(mask, settle=3)
