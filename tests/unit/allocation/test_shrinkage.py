import math
import random

import pytest

from rgft.allocation.shrinkage import shrunk


def test_posterior_mean_by_hand() -> None:
    """μ + τ²/(τ²+s²)·(x−μ)."""
    found = shrunk({"a": 5.0, "b": 5.0, "c": -1.0}, {"a": 2.0, "b": 0.5, "c": 1.0}, mean=1.0, spread=1.0)
    assert found == pytest.approx({"a": 1 + 4 / 5, "b": 1 + 4 / 1.25, "c": 1 - 2 / 2})


def test_it_is_the_mean_of_the_posterior() -> None:
    """Against the posterior computed on a grid: prior N(μ, τ²), likelihood N(x; θ, s²)."""
    mean, spread, value, error = 0.4, 0.3, 1.5, 0.7
    grid = [mean + spread * (i / 500 - 1) * 12 for i in range(1001)]
    weights = [math.exp(-(((t - mean) / spread) ** 2 + ((value - t) / error) ** 2) / 2) for t in grid]
    expected = sum(t * w for t, w in zip(grid, weights, strict=True)) / sum(weights)
    assert shrunk({"a": value}, {"a": error}, mean=mean, spread=spread)["a"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("error", [None, math.inf, math.nan])
def test_an_unknown_error_leaves_the_mean(error: float | None) -> None:
    assert shrunk({"a": 5.0}, {"a": error}, mean=1.0, spread=1.0) == {"a": 1.0}
    assert shrunk({"a": 5.0}, {}, mean=1.0, spread=1.0) == {"a": 1.0}


def test_without_spread_only_certain_scores_are_believed() -> None:
    assert shrunk({"a": 5.0, "b": 5.0}, {"a": 0.1, "b": 0.0}, mean=1.0, spread=0.0) == {"a": 1.0, "b": 5.0}


def test_certain_scores_are_left_and_the_order_of_equally_certain_ones_too() -> None:
    draw = random.Random(0)
    values = {str(i): draw.gauss(0, 3) for i in range(20)}
    assert shrunk(values, dict.fromkeys(values, 0.0), mean=1.0, spread=2.0) == pytest.approx(values)
    found = shrunk(values, dict.fromkeys(values, 2.0), mean=1.0, spread=2.0)
    assert sorted(found, key=found.__getitem__) == sorted(values, key=values.__getitem__)
    for name, value in values.items():
        assert abs(found[name] - 1.0) < abs(value - 1.0)


@pytest.mark.parametrize("tiny", [1e-200, 1e200])
def test_extreme_scales_do_not_overflow(tiny: float) -> None:
    assert shrunk({"a": 3 * tiny}, {"a": tiny}, mean=tiny, spread=tiny)["a"] == pytest.approx(2 * tiny)
