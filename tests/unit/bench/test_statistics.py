import random

import pytest
from scipy.stats import ttest_rel

from rgft.bench.statistics import compare
from rgft.errors import DataError


def test_interval_agrees_with_the_paired_t_test() -> None:
    rng = random.Random(0)
    method = {s: rng.gauss(0.8, 0.02) for s in range(6)}
    baseline = {s: v - rng.gauss(0.01, 0.01) for s, v in method.items()}
    expected = ttest_rel(list(method.values()), list(baseline.values())).confidence_interval(0.95)
    result = compare(method, baseline, higher_is_better=True)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


def test_interval_covers_the_truth() -> None:
    rng, inside = random.Random(1), 0
    for _ in range(1000):
        result = compare({s: rng.gauss(1, 1) for s in range(5)}, dict.fromkeys(range(5), 0.0), higher_is_better=True)
        inside += result.low < 1 < result.high
    assert 0.93 < inside / 1000 < 0.97


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([0.02, 0.03, 0.025], 0.0, "better"),
        ([-0.02, -0.03, -0.025], 0.01, "worse"),
        ([-0.001, 0.001, 0.0005], 0.005, "non-inferior"),
        ([-0.001, 0.001, 0.0005], 0.0, "undecided"),
        ([-0.05, 0.05, 0.0], 0.01, "undecided"),
    ],
)
def test_verdicts(differences: list[float], margin: float, verdict: str) -> None:
    baseline = dict.fromkeys(range(3), 0.5)
    higher = {s: 0.5 + d for s, d in enumerate(differences)}
    lower = {s: 0.5 - d for s, d in enumerate(differences)}
    assert compare(higher, baseline, higher_is_better=True, margin=margin).verdict == verdict
    assert compare(lower, baseline, higher_is_better=False, margin=margin).verdict == verdict


def test_only_common_seeds_count() -> None:
    assert compare({0: 1.0, 1: 2.0, 5: 99.0}, {0: 0.0, 1: 0.5, 7: -99.0}, higher_is_better=True).seeds == 2
    with pytest.raises(DataError, match="common seeds"):
        compare({0: 1.0}, {0: 1.0}, higher_is_better=True)
