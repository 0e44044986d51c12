"""Costs as metrics: where they lie, as multiples, and when they say nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench.costs import BESIDE_OTHERS, RESIDENT
from rgft.bench.figures import COSTS, figure, is_lower_better, is_of, is_of_texts, names
from rgft.bench.frontier import frontiers
from rgft.bench.paired import agreeing, at_equal_score, undecided
from rgft.bench.statistics import Comparison, Ratio, compare, compare_logarithms, mirrored
from rgft.bench.verdict import Equal, Verdict, verdicts
from rgft.cli.app import app
from rgft.errors import ConfigError, DataError
from tests.unit.bench.test_table import write

HERE = {"cpu": {"model": "here"}, "torch": {"threads": 2}}
THERE = {"cpu": {"model": "there"}, "torch": {"threads": 2}}


def costing(joules: float, *, source: str = "measured", peak: int | None = 1000, flops: float = 0.3) -> dict[str, Any]:
    """A ledger; FLOPs and memory go up a little with the joules, so that runs differ in them."""
    return {
        "ledger": {
            "flops": {"fraction_of_full": flops * (1 + joules / 1e4)},
            "energy": {"joules": {"total": joules}, "co2_grams": joules / 10, "source": source},
            "memory": {"peak_bytes": 5000 + joules, "peak_accelerator_bytes": peak and peak + joules},
        }
    }


def timed(folder: Path, label: str, *seconds: float, task: str = "sst2", **more: Any) -> None:
    """Runs that took so long, ten joules each second."""
    for seed, taken in enumerate(seconds):
        ledger = {**costing(10 * taken, **more.get("costing", {})), "environment": HERE}
        others = {key: value for key, value in more.items() if key != "costing"}
        write(folder, label, seed, 0.4, task=task, **{**ledger, "seconds": taken, **others})


def only(folder: Path, metric: str, **how: Any) -> tuple[Verdict, Comparison, Ratio]:
    (verdict,) = verdicts(folder, "rgft", "full", metric=metric, **how)
    (comparison,), (ratio,) = verdict.by_task.values(), verdict.ratios.values()
    return verdict, comparison, ratio


def test_costs_and_cosines_lie_where_runs_put_them() -> None:
    components = {"a": {"cosine": 0.5}, "b": {"cosine": 0.7}, "head": {"cosine": None}}
    weights = {"overall": {"cosine": 0.9, "relative_change": 0.1}, "components": components}
    result = {"metrics": {"test": {}}, "seconds": 7.0, **costing(20.0), "measures": {"weights": weights}}
    found = {name: figure(result, name) for name in names(result)}
    assert found == {
        "flops": pytest.approx(0.3006), "seconds": 7.0, "joules": 20.0, "co2_grams": 2.0, "peak_memory": 1020.0,
        "cosine": 0.9, "mean_cosine": pytest.approx(0.6), "a:cosine": 0.5, "b:cosine": 0.7, "weight_change": 0.1,
    }  # fmt: skip
    assert figure(result, "head:cosine") is None
    assert figure({**result, **costing(1.0, peak=None)}, "peak_memory") == 5001.0
    assert all(is_lower_better(name) and not is_of_texts(name) for name in COSTS)
    for name in ("cosine", "mean_cosine", "a:cosine"):
        assert not is_lower_better(name)
        assert not is_of_texts(name)
    # What ledgers did not have then is missing, and not undefined.
    assert not is_of({"ledger": {}}, "joules")
    assert is_of(result, "joules")


def test_a_ratio_is_the_geometric_mean_of_pairs_and_the_same_the_other_way() -> None:
    method, baseline = {0: 1.0, 1: 4.0, 2: 3.0}, {0: 2.0, 1: 16.0, 2: 6.0, 9: 1.0}
    found, other = compare_logarithms(method, baseline), compare_logarithms(baseline, method)
    assert found is not None
    assert other is not None
    ratio, inverse = Ratio.of(found), Ratio.of(other)
    assert ratio.ratio == pytest.approx((1 / 2 * 1 / 4 * 1 / 2) ** (1 / 3))
    logarithms = compare({0: math.log(2), 1: math.log(4), 2: math.log(2)}, dict.fromkeys(range(3), 0.0),
                         higher_is_better=True)  # fmt: skip
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(-logarithms.high), math.exp(-logarithms.low)))
    assert (inverse.ratio, inverse.low, inverse.high) == pytest.approx((1 / ratio.ratio, 1 / ratio.high, 1 / ratio.low))
    assert compare_logarithms({0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0}) is None


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    import random

    draw, hits, trials = random.Random(0), 0, 800
    for _ in range(trials):
        baseline = {seed: draw.lognormvariate(3.0, 1.0) for seed in range(5)}
        method = {seed: 0.4 * cost * draw.lognormvariate(0.0, 0.2) for seed, cost in baseline.items()}
        logarithms = compare_logarithms(method, baseline)
        assert logarithms is not None
        hits += Ratio.of(logarithms).low <= 0.4 <= Ratio.of(logarithms).high
    assert 0.93 <= hits / trials <= 0.97


def test_seconds_and_joules_are_compared_as_multiples(tmp_path: Path) -> None:
    timed(tmp_path, "rgft", 10.0, 21.0, 30.0)
    timed(tmp_path, "full", 30.0, 60.0, 93.0)
    verdict, comparison, ratio = only(tmp_path, "seconds")
    assert comparison.difference == pytest.approx((20 + 39 + 63) / 3)
    assert ratio.ratio == pytest.approx((10 / 30 * 21 / 60 * 30 / 93) ** (1 / 3))
    assert (ratio.verdict, ratio.seeds, verdict.sources) == ("better", 3, {})
    assert ratio.low < ratio.ratio < ratio.high < 0.4
    verdict, _, of_joules = only(tmp_path, "joules")
    assert of_joules.ratio == pytest.approx(ratio.ratio)
    assert set(verdict.sources.values()) == {"measured"}


@pytest.mark.parametrize(
    ("metric", "more", "why"),
    [
        ("seconds", {"jobs": 2}, BESIDE_OTHERS),
        ("joules", {"jobs": 2}, BESIDE_OTHERS),
        ("seconds", {"environment": THERE}, "on different machines"),
        ("joules", {"costing": {"source": "estimated"}}, "on different machines or meters"),
        ("seconds", {"costing": {"source": "estimated"}}, ""),
        ("peak_memory", {"costing": {"peak": None}}, RESIDENT),
        ("peak_memory", {"jobs": 2, "costing": {"peak": 500}}, ""),
        ("flops", {"jobs": 2, "environment": THERE, "costing": {"flops": 0.1}}, ""),
    ],
)
def test_costs_that_say_nothing_decide_nothing(tmp_path: Path, metric: str, more: dict[str, Any], why: str) -> None:
    for task in ("mrpc", "bbc"):
        timed(tmp_path / task, "rgft", 10.0, 21.0, 30.0, task=task, **more)
        timed(tmp_path / task, "full", 30.0, 60.0, 93.0, task=task)
    (verdict,) = verdicts(tmp_path, "rgft", "full", metric=metric)
    found = [*verdict.by_task.values(), *verdict.ratios.values()]
    assert {c.why for c in found} == {why}
    assert {c.verdict for c in found} == {"undecided" if why else "better"}
    assert (verdict.counted, verdict.ratio_together is None) == ((0, True) if why else (2, False))


def test_over_tasks_costs_are_multiples_whatever_the_tasks_size(tmp_path: Path) -> None:
    timed(tmp_path / "a", "rgft", 1.0, 1.1, 1.2, task="mrpc")
    timed(tmp_path / "a", "full", 2.0, 2.3, 2.4, task="mrpc")
    timed(tmp_path / "b", "rgft", 9000.0, 8000.0, 9500.0, task="bbc")
    timed(tmp_path / "b", "full", 9000.0, 8200.0, 9400.0, task="bbc")
    (verdict,) = verdicts(tmp_path, "rgft", "full", metric="seconds")
    small, large = verdict.ratios.values()
    assert verdict.together is None
    assert verdict.ratio_together is not None
    assert verdict.ratio_together.ratio == pytest.approx((small.ratio * large.ratio) ** 0.5)
    assert verdict.ratio_together.verdict == "better"


def test_compare_shows_multiples_and_how_energy_is_known(tmp_path: Path) -> None:
    for label, seconds in (("rgft", (10.0, 20.0, 31.0)), ("full", (27.0, 54.0, 81.0))):
        timed(tmp_path, label, *seconds, costing={"source": "estimated"})

    def shown(metric: str, *more: str) -> str:
        options = ["bench", "compare", "rgft", "full", str(tmp_path), "--metric", metric, *more]
        found = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
        assert found.exit_code == 0, found.output
        return found.output

    assert "2.67 times as fast" in shown("seconds")
    assert "joules (estimated)" in shown("joules")
    assert "0.374 times (-63 %)" in shown("joules")
    (told,) = json.loads(shown("joules", "--json"))["budgets"]
    (task,) = told["tasks"].values()
    assert task["source"] == "estimated"
    assert task["ratio"]["ratio"] == pytest.approx((10 / 27 * 20 / 54 * 31 / 81) ** (1 / 3))
    assert (task["verdict"], task["ratio"]["verdict"], told["together"]) == ("better", "better", None)
    assert "ratio" not in shown("loss", "--json").replace("ratio_together", "")


def test_frontiers_of_costs_leave_out_those_that_say_nothing(tmp_path: Path) -> None:
    timed(tmp_path, "rgft", 10.0, 20.0)
    timed(tmp_path, "full", 30.0, 40.0, costing={"peak": None})
    timed(tmp_path, "lora", 1.0, 2.0, jobs=2)
    timed(tmp_path, "lisa", 1.0, 2.0, ledger={"flops": {"fraction_of_full": 0.3}})
    (found,) = frontiers(tmp_path, metric="loss", against="joules").values()
    assert {point.label: point.cost for point in found.points} == {"rgft": 150.0, "full": 350.0}
    assert found.left_out == {"lora at 0.3": BESIDE_OTHERS, "lisa at 0.3": "joules not measured"}
    (found,) = frontiers(tmp_path, metric="joules").values()
    assert {point.label: point.quality for point in found.points} == {"rgft": 150.0, "full": 350.0}
    (found,) = frontiers(tmp_path, metric="loss", against="peak_memory").values()
    assert {point.label for point in found.points} == {"rgft", "lora"}
    assert found.left_out["full at 0.3"] == RESIDENT
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "jobs": 3}))
    with pytest.raises(DataError, match=f"found none: joules not measured; {BESIDE_OTHERS}"):
        frontiers(tmp_path, metric="loss", against="joules")
    refused = CliRunner().invoke(app, ["bench", "frontier", str(tmp_path), "--against", "watts"])
    assert refused.exit_code == 2
    assert "expected one of flops, seconds, joules, co2_grams, peak_memory, found 'watts'" in refused.output


def forgetting(folder: Path, label: str, by: float, score: float, *, loss: float = 0.4, **more: Any) -> None:
    """Five runs that forget so much and score so high, up to a bit of noise that is their seed's and the label's."""
    for seed in range(5):
        noise = (seed - 2) / 3000 * (label != "full")
        metrics = {"test": {"loss": loss + noise, "accuracy": score + noise + seed / 100}}
        measures = {"general": {"general_loss": {"forgetting": by + 2 * noise}}}
        write(folder, label, seed, 0.0, **{"metrics": metrics, "measures": measures, **more})


@pytest.mark.parametrize(
    ("forgets", "score", "loss", "verdict", "why"),
    [
        (0.1, 0.8, 0.4, "better", ""),
        (0.1, 0.9, 0.4, "better", ""),  # both
        (0.1, 0.7, 0.4, "undecided", "its score may be lower by more than 0.005"),
        (0.1, 0.8, 0.5, "undecided", "held-out loss is worse"),
        (0.9, 0.8, 0.4, "worse", ""),
        (0.9, 0.7, 0.4, "worse", ""),
        (0.9, 0.9, 0.4, "undecided", "the baseline's score may be lower by more than 0.005"),
        (0.9, 0.8, 0.3, "undecided", "held-out loss is worse"),
    ],
)
def test_less_forgetting_counts_at_equal_score(
    tmp_path: Path, forgets: float, score: float, loss: float, verdict: str, why: str
) -> None:
    for task in ("mrpc", "bbc"):
        forgetting(tmp_path / task, "rgft", forgets, score, loss=loss, task=task)
        forgetting(tmp_path / task, "full", 0.5, 0.8, task=task)
    # Wide enough for the least error that a score of so few examples has.
    (found,) = verdicts(tmp_path, "rgft", "full", metric="forgetting", equal=Equal(metric="accuracy"))
    assert found.together is not None
    for comparison in (*found.by_task.values(), found.together):
        assert (comparison.verdict, comparison.why) == (verdict, why)
    assert [round(c.difference, 3) for c in found.scores.values()] == [round(score - 0.8, 3)] * 2
    (without,) = verdicts(tmp_path, "rgft", "full", metric="forgetting")
    assert {c.verdict for c in without.by_task.values()} == {"better" if forgets < 0.5 else "worse"}


def test_a_task_whose_scores_are_too_few_has_no_say_over_tasks(tmp_path: Path) -> None:
    for task in ("mrpc", "cola"):
        forgetting(tmp_path / task, "rgft", 0.1, 0.8, task=task)
        forgetting(tmp_path / task, "full", 0.5, 0.8, task=task)
    forgetting(tmp_path / "bbc", "rgft", 0.1, 0.4, task="bbc")
    forgetting(tmp_path / "bbc", "full", 0.5, 0.8, task="bbc")
    for seed in (3, 4):  # three pairs are enough for forgetting, and not for scores with a margin
        next((tmp_path / "bbc").glob(f"rgft*seed{seed}.json")).unlink()
    (found,) = verdicts(tmp_path, "rgft", "full", metric="forgetting", equal=Equal(metric="accuracy"))
    assert (found.counted, len(found.by_task)) == (2, 3)


def test_a_cost_takes_no_margin_and_is_judged_where_its_ratios_spread(tmp_path: Path) -> None:
    for task, times in (("mrpc", 3.0), ("cola", 3.0)):
        timed(tmp_path / task, "rgft", 10.0, 21.0, 30.0, task=task)
        timed(tmp_path / task, "full", times * 10.1, times * 20.0, times * 31.0, task=task)
    timed(tmp_path / "bbc", "rgft", 20.0, 42.0, 60.0, task="bbc")
    timed(tmp_path / "bbc", "full", 10.0, 21.0, 30.0, task="bbc")  # half of it each time
    (found,) = verdicts(tmp_path, "rgft", "full", metric="seconds")
    assert (found.counted, len(found.by_task)) == (2, 3)
    with pytest.raises(ConfigError, match=r"margin: expected none with seconds, .* found 5"):
        verdicts(tmp_path, "rgft", "full", metric="seconds", margin=5.0)


def test_a_frontier_says_why_a_contender_is_left_out_whose_runs_lack_the_cost_in_part(tmp_path: Path) -> None:
    timed(tmp_path, "rgft", 10.0, 21.0, costing={"peak": None})
    path = next(tmp_path.glob("rgft*seed1.json"))
    result = json.loads(path.read_text())
    del result["ledger"]["memory"]
    path.write_text(json.dumps(result))
    with pytest.raises(DataError, match=RESIDENT):
        frontiers(tmp_path, metric="loss", against="peak_memory")


def test_scores_are_equal_within_the_margin_that_is_given(tmp_path: Path) -> None:
    forgetting(tmp_path, "rgft", 0.1, 0.79)
    forgetting(tmp_path, "full", 0.5, 0.80)
    options = ["bench", "compare", "rgft", "full", str(tmp_path), "--metric", "forgetting", "--at-equal", "score"]
    env = {"COLUMNS": "200"}
    strict = CliRunner().invoke(app, options, env=env).output
    assert "undecided (its score may be lower by more than 0.005" in strict
    assert "score higher by" in strict
    (told,) = json.loads(CliRunner().invoke(app, [*options, "--within", "0.02", "--json"], env=env).output)["budgets"]
    (task,) = told["tasks"].values()
    assert (task["verdict"], task["score"]["margin"]) == ("better", 0.02)
    with pytest.raises(DataError, match="metric 'f1', found"):
        verdicts(tmp_path, "rgft", "full", metric="forgetting", equal=Equal(metric="f1"))


def test_mirrored_is_the_other_order() -> None:
    ours, theirs = {0: 1.0, 1: 1.2, 2: 0.9, 3: 1.0, 4: 1.1}, {0: 0.9, 1: 1.3, 2: 1.0, 3: 1.0, 4: 1.2}
    for margin in (0.0, 0.5):
        found = compare(ours, theirs, higher_is_better=True, margin=margin)
        other = compare(theirs, ours, higher_is_better=True, margin=margin)
        assert mirrored(found) == other


def test_what_leaves_a_score_open_leaves_it_open_for_the_other_side_too() -> None:
    worse = compare({s: 0.0 + s / 90 for s in range(5)}, dict.fromkeys(range(5), 1.0), higher_is_better=True)
    assert worse.verdict == "worse"
    equal = compare({s: s / 90 for s in range(5)}, dict.fromkeys(range(5), 0.02), higher_is_better=True, margin=0.1)
    assert equal.verdict == "non-inferior"
    assert at_equal_score(worse, equal, None).verdict == "worse"
    found = at_equal_score(worse, undecided(equal, "held-out loss is undefined"), None)
    assert (found.verdict, found.why) == ("undecided", "held-out loss is undefined")
    # That one side's loss is worse is no objection to the other.
    assert at_equal_score(worse, agreeing(equal, worse), None).verdict == "worse"
