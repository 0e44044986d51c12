import pytest
import torch
from scipy.stats import spearmanr

from rgft.bench.map_study.correlation import correlate
from rgft.bench.map_study.likeness import likeness


def values(*numbers: float) -> dict[str, float]:
    return {f"c{i}": number for i, number in enumerate(numbers)}


def test_against_scipy_with_ties_and_over_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, 6, (12,), generator=generator).tolist() for _ in range(4)]
    pairs = [(values(*draws[0]), values(*draws[1])), (values(*draws[2]), values(*draws[3]))]
    expected = (spearmanr(draws[0], draws[1]).statistic + spearmanr(draws[2], draws[3]).statistic) / 2
    found = correlate(pairs, draws=200)
    assert found.rho == pytest.approx(expected)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected < found.high
    assert (found.components, found.seeds) == (12, 2)
    within = likeness(dict(zip("ab", pairs, strict=True))).within
    assert sum(value for value in within.values() if value is not None) / 2 == pytest.approx(expected)


def test_the_same_order_is_one_whatever_is_drawn() -> None:
    found = correlate([(values(1, 2, 3, 4, 5, 6), values(1, 4, 9, 16, 25, 36))], draws=100)
    assert found.rho == pytest.approx(1.0)
    assert found.low == pytest.approx(1.0)


def test_components_that_one_side_lacks_are_left_out() -> None:
    found = correlate([({"x": 9.0, **values(1, 2, 3)}, {"y": 0.0, **values(3, 2, 1)})], draws=50)
    assert found.rho == pytest.approx(-1.0)
    assert found.components == 3


def test_what_is_undefined_says_why() -> None:
    assert correlate([]).reason == "not measured"
    assert correlate([(values(1, 2), values(1, 2))]).reason == "2 components have both"
    constant = correlate([(values(1, 1, 1, 1), values(1, 2, 3, 4))])
    assert constant.rho is None
    assert constant.reason == "all components are alike"
    assert correlate([({}, values(1, 2, 3))]).reason == "not measured"


def test_seeds_are_drawn_where_there_are_several_and_with_one_nothing_is_said_of_them() -> None:
    rising, falling = (
        (values(1, 2, 3, 4, 5, 6), values(1, 2, 3, 4, 5, 6)),
        (values(1, 2, 3, 4, 5, 6), values(6, 5, 4, 3, 2, 1)),
    )
    both = correlate([rising, falling])
    # Whichever components are drawn, one seed has 1 and the other −1: only seeds can tell.
    assert (both.rho, both.low, both.high, both.over) == (pytest.approx(0.0), -1.0, 1.0, "seeds and components")
    one = correlate([rising, ({}, values(1, 2, 3))])  # a seed without a measurement does not count
    assert (one.low, one.high, one.over, one.seeds) == (pytest.approx(1.0), pytest.approx(1.0), "components", 1)


def test_studies_that_differ_are_told_apart_and_those_that_do_not_are_not() -> None:
    up, down = values(1, 2, 3, 4, 5), values(5, 4, 3, 2, 1)
    apart = likeness({"a": [up] * 3, "b": [down] * 3})
    assert (apart.within, apart.between) == ({"a": pytest.approx(1.0), "b": pytest.approx(1.0)}, pytest.approx(-1.0))
    assert apart.difference == pytest.approx(2.0)
    assert apart.p == apart.least_p == pytest.approx(2 / 20)  # of 20 ways two are as they are
    alike = likeness({"a": [up] * 3, "b": [up] * 3})
    assert (alike.difference, alike.p) == (pytest.approx(0.0), 1.0)
    mixed = likeness({"a": [up, down, up], "b": [down, up, down]})
    assert mixed.p is not None
    assert mixed.p > 0.5
    # Three studies of five seeds are dealt by lot; of each way some stand for all.
    many = likeness({"a": [up] * 5, "b": [down] * 5, "c": [values(3, 1, 5, 2, 4)] * 5})
    assert many.p == many.least_p == pytest.approx(1 / 5001)


def test_what_cannot_be_compared_is_undefined() -> None:
    up = values(1, 2, 3, 4)
    assert likeness({"a": [up, up]}).p is None
    assert likeness({"a": [up], "b": [up]}).difference is None
    other_model = likeness({"a": [up, up], "b": [{"x": 1.0, "y": 2.0, "z": 3.0}]})
    assert (other_model.between, other_model.difference, other_model.p) == (None, None, None)


def test_only_runs_that_can_change_places_are_dealt_out() -> None:
    up, down, other = values(1, 2, 3, 4), values(4, 3, 2, 1), {"x": 1.0, "y": 2.0, "z": 3.0}
    two = likeness({"a": [up] * 2, "b": [down] * 2})
    assert two.p == two.least_p == pytest.approx(1 / 3)
    unmeasured = likeness({"a": [up] * 2, "b": [down] * 2, "c": [{}] * 3})
    assert (unmeasured.p, unmeasured.least_p) == (two.p, two.least_p)
    assert unmeasured.within["c"] is None
    of_two_models = likeness({"a": [up] * 2, "b": [down] * 2, "c": [other] * 3})
    assert (of_two_models.difference, of_two_models.p, of_two_models.least_p) == (None, None, None)
    assert of_two_models.between == pytest.approx(-1.0)
