from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.periods import EveryStep, Proportional, RankedPeriod
from rgft.errors import ConfigError


@given(scores=st.lists(st.floats(-2.0, 10.0), min_size=1, max_size=10), longest=st.integers(1, 16))
def test_proportional(make: Any, scores: list[float], longest: int) -> None:
    situation = make.situation(make.flat(len(scores)), scores)
    found = Proportional(longest=longest, powers_of_two=False).periods(situation)
    top = max(scores)
    if top <= 0:
        assert found == {}
        return
    for index, score in enumerate(scores):
        period = found[f"c{index}"]
        assert period == (longest if score <= 0 or top / score >= longest else round(top / score))
        assert 1 <= period <= longest
    powers = Proportional(longest=longest).periods(situation)
    for index, score in enumerate(scores):
        ratio = longest if score <= 0 else min(longest, top / score)
        assert powers[f"c{index}"] <= ratio * (1 + 1e-9) < 2 * powers[f"c{index}"] * (1 + 1e-9)
        assert math.log2(powers[f"c{index}"]).is_integer()


def test_ranked_doubles_from_group_to_group(make: Any) -> None:
    found = RankedPeriod(levels=3).periods(make.situation(make.flat(6), [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    assert list(found.values()) == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("period", [EveryStep(), Proportional(), RankedPeriod()])
def test_no_information_means_every_step(make: Any, period: Any) -> None:
    components = make.flat(4)
    for scores in ({}, [0.0] * 4, [2.0] * 4):
        assert set(period.periods(make.situation(components, scores)).values()) <= {1}
    assert "c3" not in period.periods(make.situation(components, {"c0": 1.0, "c1": 9.0}))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"period\.longest: expected >= 1, found 0"):
        Proportional(longest=0)
