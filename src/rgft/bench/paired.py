"""Two contenders on one task, by seed and by example; and the mission's first target, RGFT beside full fine-tuning."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rgft.bench.costs import doubt
from rgft.bench.figures import COSTS, is_lower_better, is_of_texts, texts_of
from rgft.bench.finals import Finals
from rgft.bench.outcomes import by_example
from rgft.bench.statistics import Comparison, compare, compare_logarithms, mirrored

#: How much worse than tuned full fine-tuning's own score RGFT may be at a share of its FLOPs: half a point.
TARGET_MARGIN = 0.005

#: Metrics that go by single examples of the test split.
_BY_EXAMPLE = frozenset({"accuracy", "top1_error", "exact_match", "f1", "matthews"})


def difference(method: Finals, baseline: Finals, metric: str, *, margin: float = 0.0) -> Comparison:
    """How much better a contender is than another, seed by seed; see `compare`.

    With a margin it is not enough that a score is no worse: the held-out loss must not say otherwise. Whether a cost is
    less is what its ratio says (`logarithms`): differences of costs spread as the costs do, which may be unalike.
    """
    differences = _by_example(method, baseline, metric)
    found = compare(
        method.metric(metric), baseline.metric(metric), higher_is_better=not is_lower_better(metric), margin=margin,
        examples=_examples(method, baseline) if metric in _BY_EXAMPLE else None,
        by_example=differences,
    )  # fmt: skip
    found = replace(found, over_seeds_alone=differences is None and is_of_texts(metric))
    if margin <= 0.0 and (of_logarithms := logarithms(method, baseline, metric)) is not None:
        return replace(found, verdict=of_logarithms.verdict, why=of_logarithms.why)
    if reason := doubt(method, baseline, metric):
        return undecided(found, reason)
    if margin <= 0.0 or is_lower_better(metric):
        return found
    if is_target(method, baseline) and not baseline.tuning.flops:
        return undecided(found, "full fine-tuning is untuned")
    if lacking(method, baseline, "loss"):
        return undecided(found, "held-out loss is undefined")
    return agreeing(found, difference(method, baseline, "loss"))


#: Of a score that is good otherwise. It is said of one side only: the other's loss is better.
_LOSS_DISAGREES = "held-out loss is worse"


def agreeing(score: Comparison, loss: Comparison | None) -> Comparison:
    """What a score says, unless it is good and the held-out loss says worse."""
    disagrees = loss is not None and loss.verdict == "worse" and score.verdict in ("better", "non-inferior")
    return undecided(score, _LOSS_DISAGREES) if disagrees else score


def at_equal_score(found: Comparison, score: Comparison, loss: Comparison | None) -> Comparison:
    """What a figure says, unless it may have been bought with score: who is better by it must not score worse.

    Args:
        found: of the figure.
        score: of the same runs, with the margin within which scores are equal.
        loss: held-out; None: there is none to be heard beside the score.
    """
    if found.verdict == "undecided":
        return found
    whose, gained, price = "its", score, loss
    if found.verdict == "worse":
        whose, gained, price = "the baseline's", mirrored(score), None if loss is None else mirrored(loss)
        if score.why and score.why != _LOSS_DISAGREES:
            gained = undecided(gained, score.why)
    gained = agreeing(gained, price)
    if gained.verdict in ("better", "non-inferior"):
        return found
    return undecided(found, gained.why or f"{whose} score may be lower by more than {score.margin:g}")


def logarithms(method: Finals, baseline: Finals, metric: str) -> Comparison | None:
    """How the two's costs compare as multiples (see `Ratio`), seed by seed; None: the metric is no cost, or is zero."""
    found = compare_logarithms(method.metric(metric), baseline.metric(metric)) if metric in COSTS else None
    reason = doubt(method, baseline, metric)
    return undecided(found, reason) if found is not None and reason else found


def lacking(method: Finals, baseline: Finals, metric: str) -> str:
    """Why the two cannot be compared by a metric, in words; empty: they can."""
    for finals in (method, baseline):
        if lack := finals.lacks(metric):
            return f"{metric} of {finals.label} {lack}"
    if len(set(method.metric(metric)) & set(baseline.metric(metric))) < 2:
        return "fewer than two common seeds"
    return on_different_texts(method, baseline, metric)


def on_different_texts(method: Finals, baseline: Finals, metric: str) -> str:
    """Which runs of one seed measured a metric on different texts beside the task's own; empty: none that say so."""
    for seed in sorted(set(method.metric(metric)) & set(baseline.metric(metric))):
        ours, theirs = (texts_of(finals.by_seed[seed], metric) for finals in (method, baseline))
        if None not in (ours, theirs) and ours != theirs:
            return (
                f"{metric} of {method.label} and {baseline.label} with seed {seed} is on different texts; run one of "
                "them anew with the packages and the Python of the other"
            )
    return ""


def undecided(comparison: Comparison, why: str) -> Comparison:
    """The comparison, with nothing decided by it, and why."""
    # What there is too little of is said first.
    return replace(comparison, verdict="undecided", why=comparison.why or why)


def is_target(method: Finals, baseline: Finals) -> bool:
    """Whether RGFT is held against full fine-tuning at a higher budget."""
    is_full = baseline.method == "full" and baseline.is_plain
    return method.method == "rgft" and is_full and baseline.budget > method.budget


def target_margin(method: Finals, baseline: Finals, metric: str) -> float:
    """The margin that goes without saying: the target's, of scores."""
    return TARGET_MARGIN if is_target(method, baseline) and not is_lower_better(metric) else 0.0


def said(comparison: Comparison) -> str:
    """A verdict in words, with its margin."""
    margin = f"margin {comparison.margin:g}" if comparison.margin > 0.0 else ""
    alone = "over seeds alone" if is_decided_by_seeds(comparison) else ""
    beside = ", ".join(part for part in (comparison.why, margin, alone) if part)
    return f"{comparison.verdict} ({beside})" if beside else comparison.verdict


def is_decided_by_seeds(comparison: Comparison) -> bool:
    """Whether something is decided without what the choice of test examples leaves open."""
    return comparison.over_seeds_alone and comparison.verdict != "undecided"


def _by_example(method: Finals, baseline: Finals, metric: str) -> dict[int, Tensor] | None:
    """Seed → differences of the two on each test example [N]; None: not all of their runs say, or of the same test."""
    differences: dict[int, Tensor] = {}
    tests = {str((result.get("data") or {}).get("test")) for f in (method, baseline) for result in f.by_seed.values()}
    if len(tests) > 1:
        return None
    for seed in set(method.metric(metric)) & set(baseline.metric(metric)):
        ours, theirs = (by_example(finals.by_seed[seed], metric) for finals in (method, baseline))
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        differences[seed] = ours - theirs
    return differences


def _examples(method: Finals, baseline: Finals) -> int | None:
    return method.test_examples or baseline.test_examples
