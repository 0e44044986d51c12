import random

import pytest
import torch
from scipy.stats import ttest_rel

from rgft.bench.statistics import Comparison, compare, over_tasks
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
    ("differences", "margin", "verdict", "why"),
    [
        ([0.02, 0.03, 0.025], 0.0, "better", ""),
        ([-0.02, -0.03, -0.025], 0.0, "worse", ""),
        ([-0.02, -0.03, -0.025, -0.03, -0.02], 0.01, "worse", ""),
        ([-0.001, 0.001, 0.0005, 0.001, 0.0], 0.005, "non-inferior", ""),
        ([-0.001, -0.002, -0.0015, -0.001, -0.002], 0.005, "non-inferior", ""),  # worse, but by less than the margin
        ([-0.001, 0.001, 0.0005], 0.0, "undecided", ""),
        ([-0.05, 0.05, 0.0, 0.05, -0.05], 0.01, "undecided", ""),
        ([0.0200, 0.0201], 0.0, "undecided", "fewer than 3 pairs"),
        ([-0.0200, -0.0201], 0.0, "undecided", "fewer than 3 pairs"),
        ([-0.001, 0.001, 0.0005, 0.001], 0.005, "undecided", "fewer than 5 pairs"),
        ([0.02, 0.03, 0.025], 0.005, "undecided", "fewer than 5 pairs"),
        ([0.02, 0.02, 0.02], 0.0, "undecided", "no spread"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.005, "undecided", "no spread"),
    ],
)
def test_verdicts(differences: list[float], margin: float, verdict: str, why: str) -> None:
    baseline = {s: 0.5 + s / 7 for s in range(len(differences))}
    higher = {s: baseline[s] + d for s, d in enumerate(differences)}
    lower = {s: baseline[s] - d for s, d in enumerate(differences)}
    for found in (
        compare(higher, baseline, higher_is_better=True, margin=margin),
        compare(lower, baseline, higher_is_better=False, margin=margin),
    ):
        assert (found.verdict, found.why) == (verdict, why)


def test_equal_differences_of_a_share_are_no_surer_than_its_test_set() -> None:
    method, baseline = {0: 0.90125, 1: 0.93}, {0: 0.9, 1: 0.92875}
    two = compare(method, baseline, higher_is_better=True, examples=800)
    assert two.verdict == "undecided"
    assert two.low < 0 < two.high
    # One example of 800, with 3 seeds and with 10: the error is taken to be one example's. All seeds have the same 800.
    for seeds in (3, 10):
        one = compare(dict.fromkeys(range(seeds), 0.90125), dict.fromkeys(range(seeds), 0.9), higher_is_better=True,
                      examples=800)  # fmt: skip
        assert one.standard_error == pytest.approx(1 / 800)
    # 16 of 800: as if just these 16 had fallen out differently.
    many = compare(dict.fromkeys(range(3), 0.92), dict.fromkeys(range(3), 0.9), higher_is_better=True, examples=800)
    assert many.standard_error == pytest.approx((0.02 / 800) ** 0.5)
    assert many.verdict == "undecided"
    # Where seeds differ by more than that, they tell.
    wide = {0: 0.90, 1: 0.95, 2: 0.99}
    assert compare(wide, dict.fromkeys(wide, 0.9), higher_is_better=True, examples=800) == compare(
        wide, dict.fromkeys(wide, 0.9), higher_is_better=True
    )


def test_the_least_spread_covers_the_truth_where_seeds_hardly_differ() -> None:
    rng, inside, trials = random.Random(2), 0, 500
    for _ in range(trials):
        # Of 400 examples 3 % fall out differently, in favour of the one or the other.
        drawn = {s: sum(rng.choice((1, 1, -1)) for _ in range(400) if rng.random() < 0.03) / 400 for s in range(5)}
        found = compare(drawn, dict.fromkeys(drawn, 0.0), higher_is_better=True, examples=400)
        inside += found.low <= 0.01 <= found.high
    assert inside / trials >= 0.94


def drawn(rng: random.Random, *, truth: float, seeds: int, examples: int) -> dict[int, torch.Tensor]:
    """Seed → differences by example, of a part that goes with the seed, one with the example, and one with neither."""
    of_examples = [rng.gauss(truth, 1.0) for _ in range(examples)]
    return {
        seed: torch.tensor([(of_seed + own + rng.gauss(0.0, 0.5)) for own in of_examples], dtype=torch.float64)
        for seed in range(seeds)
        for of_seed in [rng.gauss(0.0, 0.05)]
    }


def test_an_interval_over_seeds_and_examples_covers_the_truth_and_one_over_seeds_alone_does_not() -> None:
    rng, inside, alone, trials = random.Random(3), 0, 0, 400
    for _ in range(trials):
        by_example = drawn(rng, truth=0.1, seeds=5, examples=100)
        method = {seed: float(values.mean()) for seed, values in by_example.items()}
        baseline = dict.fromkeys(method, 0.0)
        both = compare(method, baseline, higher_is_better=True, by_example=by_example)
        seeds = compare(method, baseline, higher_is_better=True)
        assert both.difference == seeds.difference
        inside += both.low < 0.1 < both.high
        alone += seeds.low < 0.1 < seeds.high
    assert 0.93 < inside / trials < 0.98
    assert alone / trials < 0.75


def test_of_equal_runs_nothing_is_decided_by_example_either() -> None:
    same = {seed: torch.zeros(50, dtype=torch.float64) for seed in range(5)}
    found = compare(dict.fromkeys(range(5), 0.5), dict.fromkeys(range(5), 0.5), higher_is_better=True, by_example=same)
    assert (found.verdict, found.why, found.low, found.high) == ("undecided", "no spread", 0.0, 0.0)


def test_over_tasks_only_what_has_enough_pairs_counts() -> None:
    def told(*differences: float, margin: float = 0.0) -> Comparison:
        return compare(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0), higher_is_better=True, margin=margin)

    good, other = told(0.02, 0.03, 0.025), told(0.01, 0.012, 0.011)
    both = over_tasks([({"a"}, good), ({"b"}, other)])
    assert both is not None
    assert both.verdict == "better"
    assert over_tasks([({"a"}, good), ({"b"}, other), ({"c"}, told(-0.5, -0.5001))]) == both
    assert over_tasks([({"a"}, good), ({"b"}, other), ({"c"}, told(-0.5, -0.5, -0.5))]) == both
    assert over_tasks([({"a"}, good), ({"c"}, told(-0.5, -0.5001))]) is None
    with_equal = over_tasks([({"a"}, good), ({"b"}, told(0.0, 0.0, 0.0))])
    assert with_equal is not None
    assert with_equal.difference == pytest.approx(good.difference / 2)
    few = [({name}, told(0.02, 0.03, 0.025, margin=0.005)) for name in "ab"]
    assert over_tasks(few) is None  # 5 pairs, with a margin


def test_only_common_seeds_count() -> None:
    assert compare({0: 1.0, 1: 2.0, 5: 99.0}, {0: 0.0, 1: 0.5, 7: -99.0}, higher_is_better=True).seeds == 2
    with pytest.raises(DataError, match="common seeds"):
        compare({0: 1.0}, {0: 1.0}, higher_is_better=True)
