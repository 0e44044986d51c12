from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.random import RandomMask, generator
from rgft.errors import ConfigError


def test_the_generator_is_the_hash_of_its_arguments() -> None:
    seed = int.from_bytes(hashlib.sha256(b"rgft/random/7/3").digest()[:8])
    assert generator(7, 3, "random").random() == random.Random(seed).random()


@given(seed=st.integers(0, 10**6), step=st.integers(0, 10**6), q=st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_same_count_whatever_the_map(make: Any, seed: int, step: int, q: float) -> None:
    components = make.flat(20)
    drawn = RandomMask(q=q).active(make.situation(components, seed=seed, step=step))
    assert len(drawn) == round(q * 20)
    other = make.situation(components, [float(i) for i in range(20)], seed=seed, step=step)
    assert RandomMask(q=q).active(other) == drawn


def test_every_component_is_drawn_about_equally_often(make: Any) -> None:
    components = make.flat(10)
    counts = dict.fromkeys((c.name for c in components), 0)
    for step in range(1000):
        for name in RandomMask(q=0.3).active(make.situation(components, step=step)):
            counts[name] += 1
    # Binomial(1000, .3): standard deviation 14.5.
    assert all(abs(count - 300) < 75 for count in counts.values()), counts


def test_draws_differ_between_steps_and_seeds_but_not_within_a_draw(make: Any) -> None:
    components = make.flat(20)
    mask = RandomMask(q=0.5, every=10)
    first = [mask.active(make.situation(components, step=step)) for step in range(20)]
    assert len(set(first[:10])) == len(set(first[10:])) == 1
    assert first[0] != first[10]
    assert mask.active(make.situation(components, step=0, seed=1)) != first[0]


@given(seed=st.integers(0, 500), q=st.sampled_from([0.5, 0.6, 0.8, 1.0]))
def test_by_flops_spends_the_budget_and_no_more(make: Any, seed: int, q: float) -> None:
    components = make.flat(8)
    costs = make.costs(components, {c.name: 10.0 + 3.0 * i for i, c in enumerate(components)})
    names = [c.name for c in components]
    drawn = RandomMask(q=q, by="flops").active(make.situation(components, seed=seed, costs=costs))
    limit = q * costs.step_flops(names, rows=1, tokens=1).total
    assert costs.step_flops(drawn, rows=1, tokens=1).total <= limit
    for name in set(names) - drawn:  # nothing that still fits was left out
        assert costs.step_flops([*drawn, name], rows=1, tokens=1).total > limit


def test_by_flops_keeps_the_cheapest_when_nothing_fits(make: Any) -> None:
    components = make.flat(4)
    costs = make.costs(components, dict.fromkeys((c.name for c in components), 5.0))
    assert RandomMask(q=0.01, by="flops").active(make.situation(components, costs=costs)) == {"c3"}


def test_by_flops_needs_costs(make: Any) -> None:
    with pytest.raises(ConfigError, match="needs a cost model"):
        RandomMask(by="flops").active(make.situation(make.flat(3)))
