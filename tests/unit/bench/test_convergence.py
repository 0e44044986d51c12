import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench.convergence import Against, Reached, Taken, first_reaching, reached
from rgft.bench.costs import BESIDE_OTHERS
from rgft.bench.statistics import Ratio, compare
from rgft.cli.app import app
from rgft.errors import DataError


def point(fraction: float, **metrics: float) -> dict[str, Any]:
    """An evaluation, 1,000 steps and 100 s being full fine-tuning."""
    return {
        "fraction_of_full": fraction, "epochs": 3 * fraction, "seconds": 100 * fraction, "step": round(1000 * fraction),
        "metrics": metrics,
    }  # fmt: skip


CURVE = [point(0.1, loss=0.6, accuracy=0.6), point(0.2, loss=0.4, accuracy=0.7), point(0.3, loss=0.5, accuracy=0.8)]


def write(folder: Path, label: str, seed: int, along: Any, *, budget: float = 0.3, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    result = {
        "contender": label, "method": "full", "budget": budget, "settings": {}, "seed": seed, "lr": 1e-4, "steps": 9,
        "task": {"name": "bbc", "train_size": 10}, "run": {"epochs": 3.0}, "seconds": 1.0,
        "metrics": {"test": {"loss": 0.5}}, "ledger": {"flops": {"fraction_of_full": 0.3}}, "measures": along,
        **more,
    }  # fmt: skip
    (folder / f"{label}--final--lr0.0001--seed{seed}.json").write_text(json.dumps(result))


def test_the_first_evaluation_that_is_as_good() -> None:
    loss, accuracy = (first_reaching(CURVE, metric, 0.5) for metric in ("loss", "accuracy"))
    assert loss is CURVE[1]
    assert accuracy is CURVE[0]
    assert first_reaching(CURVE, "loss", 0.1) is None


def only(folder: Path, **how: Any) -> dict[str, Reached]:
    (rows,) = reached(folder, **{"metric": "loss", "target": 0.5, **how}).values()
    return {f"{row.label} at {row.budget:g}": row for row in rows}


def reaching(folder: Path, label: str, *fractions: float | None, **more: Any) -> None:
    """Runs that get to a loss of .5 there, or never: these end at 0.3."""
    for seed, fraction in enumerate(fractions):
        end = point(0.3 if fraction is None else fraction, loss=0.6 if fraction is None else 0.5)
        write(folder, label, seed, {"along": [point(0.01, loss=0.9), end]}, **more)


def test_medians_are_over_all_runs_and_those_that_did_not_get_there_count(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, {"along": CURVE})
    write(tmp_path, "a", 1, {"along": [point(0.1, loss=0.7), point(0.3, loss=0.55)]})
    write(tmp_path, "b", 0, {"along": [point(0.05, loss=0.5)]})
    write(tmp_path, "c", 0, {})
    (rows,) = reached(tmp_path, metric="loss", target=0.5).values()
    assert [(row.label, row.reached, row.seeds) for row in rows] == [("b", 1, 1), ("a", 1, 2)]
    # Half of the runs of `a` did not get there: its median is none, but at least the mean of .2 and of what one had.
    assert rows[1].flops == Taken(median=None, at_least=pytest.approx(0.25), low=0.2, high=None)
    assert rows[1].best == pytest.approx((0.4 + 0.55) / 2)
    assert rows[0].steps == Taken(median=50.0, at_least=50.0, low=50.0, high=50.0)
    assert rows[0].seconds.median == pytest.approx(5.0)
    rows_of_end = only(tmp_path, target=None, of="a")  # ends at .525 in the mean
    assert {name: row.target for name, row in rows_of_end.items()} == dict.fromkeys(rows_of_end, pytest.approx(0.525))
    assert rows_of_end["a at 0.3"].reached == 1
    with pytest.raises(DataError, match="found none"):
        reached(tmp_path, metric="f1", target=0.5)
    with pytest.raises(DataError, match="one of the two"):
        reached(tmp_path, metric="loss", target=None)


def test_getting_there_now_and_then_does_not_flatter(tmp_path: Path) -> None:
    reaching(tmp_path, "lucky", 0.05, None, None, None, None)
    reaching(tmp_path, "steady", 0.2, 0.2, 0.22, 0.19, 0.2)
    reaching(tmp_path, "mostly", 0.1, 0.12, 0.11, None, None)
    rows = only(tmp_path)
    assert list(rows) == ["mostly at 0.3", "steady at 0.3", "lucky at 0.3"]
    assert [row.flops.median for row in rows.values()] == [0.12, 0.2, None]
    assert (rows["mostly at 0.3"].flops.low, rows["mostly at 0.3"].flops.high) == (0.1, None)
    assert (rows["lucky at 0.3"].flops.at_least, rows["lucky at 0.3"].reached) == (0.3, 1)


def test_runs_that_diverged_did_not_get_there(tmp_path: Path) -> None:
    reaching(tmp_path, "a", 0.1, 0.2)
    reaching(tmp_path, "b", 0.2, 0.2, 0.2)
    write(tmp_path, "a", 2, {}, diverged="step 3: loss is nan")
    row = only(tmp_path, against="b")["a at 0.3"]
    assert (row.reached, row.seeds, row.flops.median, row.flops.high) == (2, 3, 0.2, None)
    assert row.flops.against == Against(why="a run diverged")


def test_contenders_are_compared_by_seed(tmp_path: Path) -> None:
    reaching(tmp_path, "a", 0.05, 0.1, 0.06)
    reaching(tmp_path, "full", 0.1, 0.22, 0.12)
    rows = only(tmp_path, against="full")
    assert rows["full at 0.3"].flops.against is None
    logarithms = compare({0: math.log(2), 1: math.log(2.2), 2: math.log(2)}, dict.fromkeys(range(3), 0.0),
                         higher_is_better=True)  # fmt: skip
    for taken in (rows["a at 0.3"].flops, rows["a at 0.3"].steps, rows["a at 0.3"].seconds):
        found = taken.against
        assert found is not None
        assert found.ratio is not None
        expected = Ratio.of(logarithms)
        assert (found.bound, found.ratio.verdict, found.ratio.seeds) == ("", "better", 3)
        assert (found.ratio.ratio, found.ratio.high) == pytest.approx((expected.ratio, expected.high))


@pytest.mark.parametrize(
    ("ours", "theirs", "bound", "verdict", "ratio"),
    [
        ((0.1, 0.1, 0.11), (0.29, None, None), "at most", "better", (1 / 2.9 * 1 / 3 * 1.1 / 3) ** (1 / 3)),
        ((0.3, 0.31, 0.3), (0.1, None, 0.1), "at most", "undecided", (3 * 31 / 30 * 3) ** (1 / 3)),
        ((0.6, 0.62, 0.6), (0.29, None, 0.3), "at most", "undecided", (60 / 29 * 62 / 30 * 2) ** (1 / 3)),
        ((None, None, 0.3), (0.1, 0.11, 0.1), "at least", "worse", (3 * 30 / 11 * 3) ** (1 / 3)),
        ((None, None, 0.3), (0.9, 0.91, 0.92), "at least", "undecided", (30 / 90 * 30 / 91 * 30 / 92) ** (1 / 3)),
    ],
)
def test_runs_that_missed_it_make_a_bound_that_decides_on_its_own_side(
    tmp_path: Path, ours: Any, theirs: Any, bound: str, verdict: str, ratio: float
) -> None:
    reaching(tmp_path, "a", *ours)
    reaching(tmp_path, "full", *theirs)
    found = only(tmp_path, against="full")["a at 0.3"].flops.against
    assert found is not None
    assert found.ratio is not None
    assert (found.bound, found.ratio.verdict) == (bound, verdict)
    assert found.ratio.ratio == pytest.approx(ratio)


def test_where_both_missed_it_nothing_is_said(tmp_path: Path) -> None:
    reaching(tmp_path, "a", 0.1, None, 0.1)
    reaching(tmp_path, "b", 0.1, 0.1, None)
    reaching(tmp_path, "c", 0.1)
    rows = only(tmp_path, against="b")
    assert rows["a at 0.3"].flops.against == Against(why="both did not get there with some seeds (1 and 1 of 3)")
    assert rows["c at 0.3"].flops.against == Against(why="fewer than two common seeds")


def test_the_baseline_is_the_one_of_the_highest_budget_or_of_that_which_is_given(tmp_path: Path) -> None:
    reaching(tmp_path, "a", 0.1, 0.11, 0.1)
    reaching(tmp_path, "full", 0.2, 0.22, 0.21)
    reaching(tmp_path, "full-1.0", 0.4, 0.41, 0.42, budget=1.0)

    def ratio(budget: float | None) -> float:
        against = only(tmp_path, against="full", against_budget=budget)["a at 0.3"].flops.against
        assert against is not None
        assert against.ratio is not None
        return against.ratio.ratio

    assert ratio(None) == ratio(1.0) == pytest.approx((10 / 40 * 11 / 41 * 10 / 42) ** (1 / 3))
    assert ratio(0.3) == pytest.approx((10 / 20 * 11 / 22 * 10 / 21) ** (1 / 3))
    with pytest.raises(DataError, match=r"found full at 0\.5; known: a at 0\.3, full at 0\.3, full at 1"):
        ratio(0.5)
    with pytest.raises(DataError, match="found fool; known"):
        only(tmp_path, against="fool")


def test_seconds_of_a_busy_machine_decide_nothing(tmp_path: Path) -> None:
    reaching(tmp_path, "a", 0.1, 0.11, 0.1, jobs=2)
    reaching(tmp_path, "full", 0.2, 0.22, 0.23)
    row = only(tmp_path, against="full")["a at 0.3"]
    assert (row.flops.doubt, row.seconds.doubt) == ("", BESIDE_OTHERS)
    for taken, verdict in ((row.flops, "better"), (row.steps, "better"), (row.seconds, "undecided")):
        assert taken.against is not None
        assert taken.against.ratio is not None
        assert taken.against.ratio.verdict == verdict


def test_runs_whose_metric_is_undefined_did_not_get_there(tmp_path: Path) -> None:
    def collapsed(fraction: float) -> dict[str, Any]:
        return {**point(fraction, loss=0.7), "undefined": {"matthews": "one class only"}}

    write(tmp_path, "a", 0, {"along": [point(0.1, matthews=0.3), point(0.2, matthews=0.4)]})
    for seed in range(1, 5):
        write(tmp_path, "a", seed, {"along": [collapsed(0.1), collapsed(0.2)]})
        write(tmp_path, "b", seed, {"along": [collapsed(0.1), collapsed(0.2)]})
    rows = only(tmp_path, metric="matthews", target=0.35)
    a, b = rows["a at 0.3"], rows["b at 0.3"]
    assert (a.reached, a.seeds, a.flops.median, a.best) == (1, 5, None, 0.4)
    assert (b.reached, b.seeds, b.best) == (0, 4, None)
    result = CliRunner().invoke(
        app, ["bench", "reach", str(tmp_path), "--metric", "matthews", "--target", "0.35"], env={"COLUMNS": "200"}
    )
    assert "b at 0.3 (0 of 4 runs): not reached" in result.output
    assert "best matthews undefined" in result.output
    with pytest.raises(DataError, match="found none"):  # four of its five runs end with nothing
        only(tmp_path, metric="matthews", target=None, of="a")
