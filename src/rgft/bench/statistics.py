"""Paired comparisons: a mean difference over seeds, its interval, and a verdict in words.

Two methods that ran with the same seeds (same data order, same initial classifier) are compared seed by seed, and, all
of them being tested on the same examples, example by example. A difference varies with both; its standard error is

    √(s_seeds² / S + s_examples² / n)

with s_seeds the standard deviation of the S differences of seeds, and s_examples that of the n differences of examples,
each a mean over seeds. (Both include the residual, so that it is slightly too large.) The interval is Student's t
with Satterthwaite's degrees of freedom: a percentile bootstrap of five seeds is too narrow, it covers about 83 % where
95 % is claimed.

Few seeds may agree by chance, and an accuracy moves by whole examples. So two or fewer pairs decide nothing, nor does
a spread of zero. Where runs do not say what became of each example, differences of a metric that goes by single ones,
n of them, have no smaller standard error than their test set alone would make: a difference d means that at least |d|·n
examples fell out differently, which has the variance |d|/n (McNemar's, with the fewest such examples); at least one
example's, where d is less. It is the same test set for all seeds, so that more of them do not lessen it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, stdev
from typing import Any, Literal

import torch
from scipy.stats import t as student_t
from torch import Tensor

from rgft.errors import DataError

Verdict = Literal["better", "non-inferior", "worse", "undecided"]

#: Pairs below which nothing is decided, and below which nothing is with a margin.
MIN_PAIRS, MIN_PAIRS_WITH_MARGIN = 3, 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Method minus baseline, in the metric's unit; positive is better (losses are negated).

    Attributes:
        difference: mean over paired seeds.
        low, high: its 95 % interval.
        seeds: how many pairs.
        standard_error: of the difference.
        freedom: its degrees of freedom.
        margin: of non-inferiority, in the metric's unit.
        verdict: "better": interval above 0. "non-inferior": interval above −margin. "worse": interval below 0.
            "undecided": none of these, or there is not enough to decide by. Of a cost it is what its ratio says.
        why: what there is not enough of; empty: there is.
        over_seeds_alone: whether it leaves out what the choice of test examples leaves open.
    """

    difference: float
    low: float
    high: float
    seeds: int
    standard_error: float
    freedom: float
    margin: float
    verdict: Verdict
    why: str = ""
    over_seeds_alone: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A method's cost as a multiple of a baseline's: the geometric mean over paired seeds.

    Not the ratio of means, which the dearest runs decide, and of which no pair is part: the geometric mean of
    baseline over method is one over that of method over baseline, and means over tasks of unlike size make sense.

    Attributes:
        ratio: below 1: the method's is less.
        low, high: its 95 % interval, by Student's t on the logarithms.
        seeds: how many pairs.
        verdict: "better": interval below 1. "worse": above 1. "undecided": neither, or not enough to decide by.
        why: what there is not enough of; empty: there is.
    """

    ratio: float
    low: float
    high: float
    seeds: int
    verdict: Verdict
    why: str = ""

    @classmethod
    def of(cls, logarithms: Comparison) -> Ratio:
        """From a comparison of logarithms of costs, of which less is better."""
        centre, low, high = logarithms.difference, logarithms.low, logarithms.high
        return cls(
            ratio=math.exp(-centre), low=math.exp(-high), high=math.exp(-low), seeds=logarithms.seeds,
            verdict=logarithms.verdict, why=logarithms.why,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_logarithms(method: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    """Compares the logarithms of two methods' costs by seed; see `compare`, of which `Ratio.of` makes a ratio.

    Args:
        method, baseline: seed → cost; only seeds that both have are used.

    Returns:
        None where a cost is zero, of which nothing is a multiple.

    Raises:
        DataError: fewer than two common seeds.
    """
    if min((*method.values(), *baseline.values()), default=1.0) <= 0.0:
        return None
    ours, theirs = ({seed: math.log(cost) for seed, cost in costs.items()} for costs in (method, baseline))
    return compare(ours, theirs, higher_is_better=False)


def min_pairs(margin: float) -> int:
    """How many pairs it takes to decide."""
    return MIN_PAIRS_WITH_MARGIN if margin > 0.0 else MIN_PAIRS


def compare(
    method: Mapping[int, float], baseline: Mapping[int, float], *, higher_is_better: bool, margin: float = 0.0,
    examples: int | None = None, by_example: Mapping[int, Tensor] | None = None,
) -> Comparison:  # fmt: skip
    """Compares two methods by seed, and by example where it is known what became of each.

    Args:
        method, baseline: seed → value; only seeds that both have are used.
        higher_is_better: False for losses.
        margin: how much worse still counts as non-inferior, in the metric's unit.
        examples: that were tested, of a metric that goes by single ones; None: it does not, or nobody knows.
        by_example: seed → method minus baseline on each test example [N], whose mean is that of the metric; of all
            common seeds. None: nobody knows.

    Raises:
        DataError: fewer than two common seeds.
    """
    common = sorted(set(method) & set(baseline))
    if len(common) < 2:
        raise DataError(f"a paired comparison needs at least 2 common seeds; found {common}")
    sign = 1.0 if higher_is_better else -1.0
    differences = [sign * (method[seed] - baseline[seed]) for seed in common]
    centre, freedom = mean(differences), len(differences) - 1.0
    # What is equal but for rounding does not spread.
    spread = stdev(differences) if max(differences) - min(differences) > 1e-12 else 0.0
    error = spread / len(differences) ** 0.5
    if by_example is not None:
        error, freedom = _with_examples(error, freedom, torch.stack([by_example[seed] for seed in common]).mean(0))
    elif examples is not None:
        error = max(error, math.sqrt(max(abs(centre), 1.0 / examples) / examples))
    return _comparison(centre, error, freedom=freedom, seeds=len(common), margin=margin)


def _with_examples(error: float, freedom: float, of_examples: Tensor) -> tuple[float, float]:
    """Standard error and degrees of freedom of seeds together with those of examples [N]."""
    count = len(of_examples)
    of_test_set = float(of_examples.std()) / count**0.5 if count > 1 else 0.0
    quartic = error**4 / freedom + of_test_set**4 / max(1, count - 1)
    both = math.hypot(error, of_test_set)
    return both, both**4 / quartic if quartic else freedom


def over_tasks(comparisons: Sequence[tuple[Collection[str], Comparison]]) -> Comparison | None:
    """The mean difference over tasks, each counting once; its interval by Welch and Satterthwaite.

    Tasks with a corpus in common are not independent: they count as one, whose standard error is the mean of theirs, as
    if they told the same. Tasks that have too few pairs to decide anything, or no spread, do not count.

    Args:
        comparisons: (corpora, comparison) of each task, all with one margin.

    Returns:
        None with fewer than two that are independent.
    """
    together = _dependent([item for item in comparisons if counts(item[1])])
    if len(together) < 2:
        return None
    centre = mean(mean(c.difference for c in same) for same in together)
    errors = [(mean(c.standard_error for c in same), min(c.freedom for c in same)) for same in together]
    counted = [comparison for same in together for comparison in same]
    variance = sum(error**2 for error, _ in errors)
    quartic = sum(error**4 / freedom for error, freedom in errors)
    found = _comparison(
        centre, math.sqrt(variance) / len(errors), freedom=variance**2 / quartic if quartic else math.inf,
        seeds=min(c.seeds for c in counted), margin=counted[0].margin,
    )  # fmt: skip
    return replace(found, over_seeds_alone=any(c.over_seeds_alone for c in counted))


def counts(comparison: Comparison) -> bool:
    """Whether a task's comparison says enough to stand among others: runs that are equal do."""
    is_equal = comparison.difference == 0.0
    return comparison.seeds >= min_pairs(comparison.margin) and (comparison.standard_error > 0.0 or is_equal)


def mirrored(comparison: Comparison) -> Comparison:
    """The baseline beside the method: what `compare` says of them in the other order."""
    found = _comparison(
        -comparison.difference, comparison.standard_error, freedom=comparison.freedom, seeds=comparison.seeds,
        margin=comparison.margin,
    )  # fmt: skip
    return replace(found, over_seeds_alone=comparison.over_seeds_alone)


def _dependent(comparisons: Sequence[tuple[Collection[str], Comparison]]) -> list[list[Comparison]]:
    """Comparisons in parts that have no corpus in common."""
    parts: list[tuple[set[str], list[Comparison]]] = []
    for corpora, comparison in comparisons:
        joined, own = set(corpora), [comparison]
        for part in [part for part in parts if part[0] & set(corpora)]:
            parts.remove(part)
            joined, own = joined | part[0], [*part[1], *own]
        parts.append((joined, own))
    return [own for _, own in parts]


def _comparison(centre: float, error: float, *, freedom: float, seeds: int, margin: float) -> Comparison:
    half = error * float(student_t.ppf(0.975, freedom)) if error else 0.0
    low, high = centre - half, centre + half
    why = f"fewer than {min_pairs(margin)} pairs" if seeds < min_pairs(margin) else "" if error else "no spread"
    return Comparison(
        difference=centre, low=low, high=high, seeds=seeds, standard_error=error, freedom=freedom,
        margin=margin,
        verdict="undecided" if why else _verdict(low, high, margin), why=why,
    )  # fmt: skip


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if low > 0.0:
        return "better"
    if low > -margin:
        return "non-inferior"
    return "worse" if high < 0.0 else "undecided"
