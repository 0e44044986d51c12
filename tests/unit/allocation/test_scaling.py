from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.scaling import (
    Bounded,
    DecreaseRatio,
    GradientNormalised,
    MeanPreserved,
    Normalised,
    Rank,
    Uniform,
    with_mean_one,
)
from rgft.error_map import ErrorMap
from rgft.errors import ConfigError

scores_lists = st.lists(st.floats(-10.0, 10.0).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=12)
ALL = [Uniform(), Normalised(), Normalised(by="mean"), GradientNormalised(), Rank(), DecreaseRatio()]


@given(scores=scores_lists, alpha=st.floats(0.0, 5.0))
def test_normalised_is_proposal_b(make: Any, scores: list[float], alpha: float) -> None:
    situation = make.situation(make.flat(len(scores)), scores)
    e = [max(0.0, s) for s in scores]
    by_max = list(Normalised(by="max", alpha=alpha).multipliers(situation).values())
    by_mean = list(Normalised(by="mean", alpha=alpha).multipliers(situation).values())
    if sum(e) == 0.0:
        assert by_max == by_mean == [1.0] * len(e)
    else:
        assert by_max == pytest.approx([1 + alpha * x / max(e) for x in e])
        assert by_mean == pytest.approx([1 + alpha * len(e) * x / sum(e) for x in e])


@given(scores=scores_lists, norm=st.floats(0.01, 10.0), gamma=st.floats(0.0, 3.0))
def test_gradient_normalised_is_proposal_a(make: Any, scores: list[float], norm: float, gamma: float) -> None:
    situation = make.situation(make.flat(len(scores)), scores, gradient_norm_squared=norm)
    found = GradientNormalised(gamma=gamma, epsilon=1e-3, bounds=(0.5, 4.0)).multipliers(situation)
    wanted = [min(4.0, max(0.5, 1 + gamma * s / (norm + 1e-3))) for s in scores]
    assert list(found.values()) == pytest.approx(wanted)


def test_gradient_normalised_without_a_norm_or_with_a_zero_one(make: Any) -> None:
    components = make.flat(3)
    assert set(GradientNormalised().multipliers(make.situation(components, [1.0, 2.0, 3.0])).values()) == {1.0}
    zero = make.situation(components, [0.0, 2.0, 3.0], gradient_norm_squared=0.0)
    assert list(GradientNormalised(bounds=(0.1, 7.0)).multipliers(zero).values()) == [1.0, 7.0, 7.0]


@given(scores=st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=10), alpha=st.floats(0.0, 0.99))
def test_rank_averages_ties(make: Any, scores: list[float], alpha: float) -> None:
    found = Rank(alpha=alpha).multipliers(make.situation(make.flat(len(scores)), scores))
    k = len(scores)
    ranks = [sum(t < s for t in scores) + (sum(t == s for t in scores) - 1) / 2 for s in scores]
    assert list(found.values()) == pytest.approx([1 + alpha * (2 * r / (k - 1) - 1) for r in ranks])
    assert sum(found.values()) / k == pytest.approx(1.0)


@given(
    pairs=st.lists(
        # A same-batch decrease of next to nothing makes the ratio as uncertain as rounding makes its numerator.
        st.tuples(st.floats(-1.0, 2.0), st.floats(-0.5, 2.0).filter(lambda s: s <= 0.0 or s > 1e-3)),
        min_size=1,
        max_size=10,
    ),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_decrease_ratio(make: Any, pairs: list[tuple[float, float]], power: float) -> None:
    components = make.flat(len(pairs))
    situation = make.situation(
        components, [g for g, _ in pairs], same_batch_map=make.map(components, [s for _, s in pairs])
    )
    # Seen four times alike, and a wide prior: no uncertainty, so nothing is shrunk.
    values = situation.error_map.values()
    certain = ErrorMap.empty(values)
    for step in range(4):
        certain = certain.observe(values, step=step)
    situation = replace(situation, error_map=certain)
    found = DecreaseRatio(power=power, spread=1e3, floor=0.01, f_min=0.25, f_max=4.0).multipliers(situation)
    usable = {c.name: (g, s) for c, (g, s) in zip(components, pairs, strict=True) if s > 0}
    raw = {name: min(1.0, max(0.01, g / s)) ** power for name, (g, s) in usable.items()}
    assert all(found[c.name] == 1.0 for c in components if c.name not in raw)
    if raw:
        chosen = {name: found[name] for name in raw}
        assert sum(chosen.values()) / len(chosen) == pytest.approx(1.0)
        assert all(0.25 - 1e-12 <= f <= 4.0 + 1e-12 for f in chosen.values())
        free = [name for name, f in chosen.items() if 0.2501 < f < 3.999]
        assert all(chosen[a] * raw[b] == pytest.approx(chosen[b] * raw[a]) for a in free for b in free)


def test_uncertain_ratios_are_alike(make: Any) -> None:
    components = make.flat(3)
    same_batch = make.map(components, [1.0, 1.0, 1.0])
    situation = make.situation(components, [0.9, 0.1, 0.2], same_batch_map=same_batch)
    assert list(DecreaseRatio().multipliers(situation).values()) == pytest.approx([1.0] * 3)
    noisy = ErrorMap.empty(situation.error_map.names)
    for step in range(1, 200):
        noisy = noisy.observe(
            {c.name: v + (-1) ** step * 0.1 for c, v in zip(components, [0.9, 0.1, 0.2], strict=True)}, step=step
        )
    factors = list(DecreaseRatio(spread=1.0).multipliers(replace(situation, error_map=noisy)).values())
    assert factors[0] > 1.5 * factors[2] > 1.5 * factors[1]


def test_decrease_ratio_without_the_second_map(make: Any) -> None:
    assert set(DecreaseRatio().multipliers(make.situation(make.flat(2), [1.0, 2.0])).values()) == {1.0}


@given(
    raw=st.lists(st.floats(0.0, 100.0).filter(lambda x: x == 0.0 or x > 1e-6), min_size=1, max_size=10),
    low=st.floats(0.0, 1.0), high=st.floats(1.0, 20.0),
)  # fmt: skip
def test_with_mean_one_against_bisection(raw: list[float], low: float, high: float) -> None:
    found = list(with_mean_one({str(i): f for i, f in enumerate(raw)}, low, high).values())
    if not any(raw):
        assert found == [1.0] * len(raw)
        return

    def at(c: float) -> list[float]:
        return [min(high, max(low, c * f)) for f in raw]

    smallest, largest = 0.0, 1e12
    for _ in range(300):
        middle = (smallest + largest) / 2
        smallest, largest = (middle, largest) if sum(at(middle)) < len(raw) else (smallest, middle)
    assert found == pytest.approx(at(largest), abs=1e-6)
    assert all(low <= f <= high for f in found)
    if sum(high if f > 0 else low for f in raw) >= len(raw):
        assert sum(found) / len(found) == pytest.approx(1.0)


@given(scores=scores_lists)
@pytest.mark.parametrize("inner", [Normalised(alpha=3.0), Normalised(by="mean"), Rank(), Uniform()])
def test_mean_is_preserved_over_all_and_among_some(make: Any, inner: Any, scores: list[float]) -> None:
    situation = make.situation(make.flat(len(scores)), scores)
    scaling = MeanPreserved(scaling=inner, f_min=0.3, f_max=3.0)
    found = scaling.multipliers(situation)
    assert sum(found.values()) / len(found) == pytest.approx(1.0)
    some = frozenset(list(found)[::2])
    among = scaling.among(situation, some)
    assert sum(among[name] for name in some) / len(some) == pytest.approx(1.0)


def test_unbounded_mean_preserved_is_division_by_the_mean(make: Any) -> None:
    situation = make.situation(make.flat(3), [1.0, 2.0, 4.0])
    f = list(Normalised().multipliers(situation).values())
    found = MeanPreserved(scaling=Normalised()).multipliers(situation)
    assert list(found.values()) == pytest.approx([x / (sum(f) / 3) for x in f])


def test_bounded_clamps(make: Any) -> None:
    situation = make.situation(make.flat(3), {"c0": 0.0, "c1": 4.0})
    found = Bounded(scaling=Normalised(alpha=9.0), f_min=2.0, f_max=5.0).multipliers(situation)
    assert found == {"c0": 2.0, "c1": 5.0, "c2": 1.0}


@pytest.mark.parametrize("scaling", [*ALL, *(MeanPreserved(scaling=s) for s in ALL)])
def test_unobserved_zero_and_equal_maps(make: Any, scaling: Any) -> None:
    components = make.flat(4)
    same = {"same_batch_map": make.map(components, [1.0] * 4), "gradient_norm_squared": 1.0}
    assert set(scaling.multipliers(make.situation(components, **same)).values()) == {1.0}
    zero = scaling.multipliers(make.situation(components, [0.0] * 4, **same))
    assert set(zero.values()) == {1.0}
    partly = scaling.multipliers(make.situation(components, {"c0": 1.0, "c1": 3.0}, **same))
    assert partly["c2"] == partly["c3"] == 1.0
    equal = scaling.multipliers(make.situation(components, [2.0] * 4, **same))
    assert len(set(equal.values())) == 1
    if isinstance(scaling, MeanPreserved | Rank | DecreaseRatio):
        assert equal["c0"] == pytest.approx(1.0)


def test_extreme_scores_stay_finite(make: Any) -> None:
    for scores in ([1e308, 1e308, 5e-324], [5e-324, 0.0, 5e-324]):
        for scaling in (Normalised(), Normalised(by="mean"), MeanPreserved(scaling=Normalised())):
            assert all(math.isfinite(f) for f in scaling.multipliers(make.situation(make.flat(3), scores)).values())


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Normalised, {"by": "sum"}, "'max' or 'mean', found 'sum'"),
        (Normalised, {"alpha": -1.0}, "alpha"),
        (GradientNormalised, {"bounds": (0.0, 2.0)}, "use a mask"),
        (GradientNormalised, {"epsilon": 0.0}, "epsilon"),
        (Rank, {"alpha": 1.0}, "alpha < 1"),
        (DecreaseRatio, {"f_min": 1.5}, "low <= 1 <= high"),
        (DecreaseRatio, {"floor": 0.0}, "floor"),
        (MeanPreserved, {"scaling": Uniform(), "f_min": 2.0}, "f_min <= 1 <= f_max"),
    ],
)
def test_bad_settings(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**settings)
