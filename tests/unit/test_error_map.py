import math
import random

import pytest

from rgft.error_map import ErrorMap
from rgft.errors import ConfigError, NonFiniteError


def observe_all(scores: list[float], beta: float, *, corrected: bool = True) -> ErrorMap:
    error_map = ErrorMap.empty(["a", "b"], beta=beta, bias_correction=corrected)
    for step, score in enumerate(scores):
        error_map = error_map.observe({"a": score}, step=step)
    return error_map


def weights(count: int, beta: float) -> list[float]:
    raw = [(1 - beta) * beta ** (count - 1 - i) for i in range(count)]
    return [w / sum(raw) for w in raw]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_value_is_the_weighted_mean_of_its_definition(beta: float) -> None:
    scores = [random.Random(3).uniform(-1, 2) for _ in range(7)]
    expected = sum(w * s for w, s in zip(weights(7, beta), scores, strict=True))
    assert observe_all(scores, beta).value("a") == pytest.approx(expected, rel=1e-12)


def test_without_bias_correction_starts_from_zero() -> None:
    assert observe_all([2.0], 0.9, corrected=False).value("a") == pytest.approx(0.2)
    assert observe_all([2.0], 0.9).value("a") == pytest.approx(2.0)


def test_unobserved_is_held_and_never_zero() -> None:
    error_map = observe_all([1.0, 3.0], 0.9)
    assert error_map.value("b") is None
    assert error_map.observed == ("a",)
    held = error_map.observe({"b": 5.0}, step=9)
    assert held.value("a") == error_map.value("a")
    assert held.counts == {"a": 2, "b": 1}


def test_variance_and_standard_error_against_definition() -> None:
    beta, scores = 0.8, [1.0, 4.0, 2.0, 8.0]
    w = weights(4, beta)
    mean = sum(x * s for x, s in zip(w, scores, strict=True))
    variance = sum(x * (s - mean) ** 2 for x, s in zip(w, scores, strict=True))
    squares = sum(x * x for x in w)
    error_map = observe_all(scores, beta)
    assert error_map.variance("a") == pytest.approx(variance)
    assert error_map.standard_error("a") == pytest.approx(math.sqrt(variance / (1 - squares) * squares))
    assert observe_all([1.0], beta).variance("a") is None


def test_standard_error_covers_the_truth() -> None:
    rng, inside = random.Random(0), 0
    for _ in range(400):
        error_map = observe_all([rng.gauss(5, 2) for _ in range(60)], 0.9)
        value, error = error_map.value("a"), error_map.standard_error("a")
        assert value is not None
        assert error is not None
        inside += abs(value - 5) < 2 * error
    assert 0.90 < inside / 400 < 0.99


def test_bad_scores_change_nothing() -> None:
    error_map = observe_all([1.0], 0.9)
    with pytest.raises(NonFiniteError, match="score of 'a'"):
        error_map.observe({"a": float("nan")}, step=1)
    with pytest.raises(KeyError, match="unknown"):
        error_map.observe({"unknown": 1.0}, step=1)
    assert error_map.value("a") == 1.0


def test_beta_outside_its_range() -> None:
    with pytest.raises(ConfigError, match=r"error_map\.beta"):
        ErrorMap.empty(["a"], beta=1.0)


def test_round_trip_top_and_share() -> None:
    error_map = ErrorMap.empty(["a", "b", "c"]).observe({"a": 1.0, "b": 3.0, "c": -1.0}, step=4)
    assert ErrorMap.from_dict(error_map.to_dict()) == error_map
    assert error_map.top(2) == (("b", pytest.approx(3.0)), ("a", pytest.approx(1.0)))
    assert error_map.captured(["b", "c"]) == pytest.approx(0.75)
    assert error_map.captured(["c"]) == 0.0
    assert ErrorMap.empty(["a"]).captured(["a"]) is None


def test_quantised_maps_agree_across_rounding() -> None:
    one = ErrorMap.empty(["a"]).observe({"a": 0.1234567890}, step=0)
    other = ErrorMap.empty(["a"]).observe({"a": 0.1234567891}, step=0)
    assert one != other
    assert one.quantised() == other.quantised()


def test_uncertainty_is_that_of_students_t() -> None:
    for count, factor in ((1, None), (2, None), (3, None), (4, math.sqrt(3)), (10, math.sqrt(9 / 7))):
        error_map = observe_all([3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0, 5.5, 3.5][:count], beta=0.9)
        error, found = error_map.standard_error("a"), error_map.uncertainty("a")
        if factor is None or error is None:
            assert found is None
        else:
            assert found == pytest.approx(factor * error)
    assert error_map.uncertainty("b") is None
