from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.energy import Energy
from rgft.allocation.threshold import TargetSparsity, Threshold, TopFraction
from rgft.errors import ConfigError

scores_lists = st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=12)


@given(scores=scores_lists, tau=st.floats(-5.0, 5.0))
def test_threshold(make: Any, scores: list[float], tau: float) -> None:
    found = Threshold(tau=tau).active(make.situation(make.flat(len(scores)), scores))
    assert found == {f"c{i}" for i, s in enumerate(scores) if s > tau}


@given(scores=scores_lists, fraction=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9, 1.0]))
def test_top_fraction_holds_the_highest(make: Any, scores: list[float], fraction: float) -> None:
    found = TopFraction(fraction=fraction).active(make.situation(make.flat(len(scores)), scores))
    exact = fraction * len(scores)
    assert 0 <= len(found) - exact + 1e-9 < 1
    chosen = sorted((scores[int(name[1:])] for name in found), reverse=True)
    assert chosen == sorted(scores, reverse=True)[: len(found)]


def test_a_rounding_error_adds_no_component(make: Any) -> None:
    found = TopFraction(fraction=0.1).active(make.situation(make.flat(30), [float(i) for i in range(30)]))
    assert found == {"c27", "c28", "c29"}


def test_ties_go_to_the_deeper_component(make: Any) -> None:
    assert TopFraction(fraction=0.5).active(make.situation(make.flat(4), [0.0] * 4)) == {"c2", "c3"}


@given(data=st.data(), fraction=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), heads=st.integers(1, 6))
def test_sparsity_is_exact_in_every_layer(make: Any, data: Any, fraction: float, heads: int) -> None:
    components = make.model(layers=3, heads=heads)
    scores = data.draw(st.lists(st.floats(-5, 5), min_size=len(components), max_size=len(components)))
    found = TargetSparsity(fraction=fraction).active(make.situation(components, scores))
    assert {"embeddings", "classifier"} <= found
    value = dict(zip((c.name for c in components), scores, strict=True))
    for layer in range(3):
        members = [c.name for c in components if c.layer == f"layers.{layer}"]
        off = [name for name in members if name not in found]
        assert len(off) == int(fraction * len(members))
        assert all(value[a] <= value[b] for a in off for b in members if b in found)


def test_global_sparsity_ranks_the_whole_model(make: Any) -> None:
    components = make.model(layers=2, heads=1)
    scores = [float(i) for i in range(len(components))]
    found = TargetSparsity(fraction=0.5, scope="global").active(make.situation(components, scores))
    assert found == {c.name for c in components[len(components) // 2 :]}


@given(
    scores=st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=9), rho=st.sampled_from([0.2, 0.5, 0.9, 0.99, 1.0])
)  # fmt: skip
def test_energy_is_the_smallest_set_by_brute_force(make: Any, scores: list[float], rho: float) -> None:
    found = Energy(rho=rho).active(make.situation(make.flat(len(scores)), scores))
    largest = max(0.0, *scores, 0.0)
    if largest == 0.0:
        assert len(found) == len(scores)
        return
    e = [(max(0.0, s) / largest) ** 2 for s in scores]
    assert sum(e[int(name[1:])] for name in found) >= rho * sum(e) * (1 - 1e-12)
    fewer = (sum(subset) for subset in itertools.combinations(e, len(found) - 1))
    assert all(total < rho * sum(e) * (1 + 1e-12) for total in fewer)


@pytest.mark.parametrize(
    "mask", [Threshold(tau=99.0), TargetSparsity(fraction=1.0), TopFraction(fraction=0.01), Energy(rho=0.5)]
)
def test_unobserved_components_are_on(make: Any, mask: Any) -> None:
    components = make.model(layers=2)
    assert mask.active(make.situation(components)) == {c.name for c in components}
    seen = {c.name: 1.0 + i for i, c in enumerate(components) if c.kind == "head"}
    found = mask.active(make.situation(components, seen))
    assert {c.name for c in components if c.kind != "head"} <= found
    assert len(found & seen.keys()) < len(seen)


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: Threshold(tau=float("nan")), "finite"),
        (lambda: TargetSparsity(fraction=1.5), "fraction <= 1, found 1.5"),
        (lambda: TargetSparsity(scope="block"), "'layer' or 'global'"),  # type: ignore[arg-type]
        (lambda: TopFraction(fraction=0.0), "0 < fraction"),
        (lambda: Energy(rho=2.0), "rho"),
    ],
)
def test_bad_settings(make_bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_bad()
