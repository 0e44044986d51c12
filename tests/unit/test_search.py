"""Successive halving on candidates whose losses are made up; rounds and rates by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from rgft.errors import NonFiniteError
from rgft.search import Round, Search, first_rate, judged, rounds_within, successive_halving


def test_the_worse_half_is_dropped_each_round() -> None:
    """Candidate r loses |r − 3| at every step, less the longer it trains."""
    made: dict[float, int] = dict.fromkeys((1.0, 2.0, 3.0, 4.0, 5.0), 0)
    left: list[list[float]] = []

    def train(rate: float, steps: int) -> list[float]:
        made[rate] += steps
        return [abs(rate - 3.0) / made[rate]] * steps

    best, rounds = successive_halving(list(made), [4, 8, 16], train, lambda alive: left.append(list(alive)))
    assert best == 3.0
    assert left == [[2.0, 3.0, 4.0], [2.0, 3.0], [3.0]]
    assert made == {1.0: 4, 2.0: 28, 3.0: 28, 4.0: 12, 5.0: 4}
    assert [sorted(r.losses) for r in rounds] == [[1, 2, 3, 4, 5], [2, 3, 4], [2, 3]]
    assert rounds[0].losses[1.0] == pytest.approx(2.0 / 4)
    assert rounds[1].losses[2.0] == pytest.approx(1.0 / 12)  # the last eight of twelve


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9.0, 1.0, 2.0], 1.5), ([9.0, *[1.0] * 8], 1.0), ([9.0, 9.0, *[1.0] * 8], 1.0),
        ([9.0] * 12 + [1.0] * 12, 1.0), ([9.0] * 11 + [1.0] * 13, 1.0), ([5.0], math.inf), ([], math.inf),
        ([1.0, math.inf], math.inf),
    ],
)  # fmt: skip
def test_what_a_candidate_is_judged_on(losses: list[float], expected: float) -> None:
    assert judged(losses) == expected


def test_candidates_that_diverge_are_dropped_however_many() -> None:
    def train(rate: float, steps: int) -> Sequence[float]:
        if rate > 2.0:
            raise NonFiniteError("nan")
        return [1.0] * steps if rate == 1.0 else [math.nan] * steps

    best, rounds = successive_halving([1.0, 2.0, 3.0, 4.0], [2, 4], train, lambda alive: None)
    assert best == 1.0
    assert len(rounds) == 1
    with pytest.raises(NonFiniteError, match="learning rates 3, 4 all diverged"):
        successive_halving([3.0, 4.0], [2], train, lambda alive: None)


@pytest.mark.parametrize(
    ("steps_left", "candidates", "lengths"),
    [
        (1000, (1e-4, 2e-4, 4e-4, 8e-4), [20, 40]),  # two lose after 20 steps, one after 60: a tenth of 1000
        (150, (1e-4, 2e-4, 4e-4, 8e-4), [3, 6]),
        (149, (1e-4, 2e-4, 4e-4), [3, 6]),  # of three, one loses after 3 and one after 9
        (119, (2e-4, 4e-4), [11]),
        (30, (2e-4, 4e-4), [3]),
        (29, (2e-4,), []),
        (math.inf, (2e-4,), []),
    ],
)
def test_as_many_candidates_as_there_are_steps_for(
    steps_left: float, candidates: tuple[float, ...], lengths: list[int]
) -> None:
    assert rounds_within((8e-4, 2e-4, 1e-4, 4e-4), steps_left) == (candidates, lengths)


def test_the_run_begins_with_the_lower_of_the_middle_ones() -> None:
    assert [first_rate(rates) for rates in ((3.0,), (4.0, 2.0), (1.0, 3.0, 2.0), (4.0, 1.0, 2.0, 3.0))] == [3, 2, 2, 2]


def test_a_search_goes_round_as_json() -> None:
    search = Search(rate=1e-3, rounds=(Round(steps=3, losses={1e-3: 0.5, 1.0: math.inf}),), flops=7.0, seconds=0.5)
    data = search.to_dict()
    assert data["rounds"] == [{"steps": 3, "losses": [[1e-3, 0.5], [1.0, None]]}]
    assert Search.from_dict(data) == search
