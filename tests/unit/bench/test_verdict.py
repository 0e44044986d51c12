import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rgft.bench.statistics import Comparison, compare, over_tasks
from rgft.bench.table import markdown
from rgft.bench.verdict import verdicts
from rgft.cli.app import app
from rgft.errors import DataError
from tests.unit.bench.test_table import write


def test_each_task_and_all_together_at_each_budget(tmp_path: Path) -> None:
    for seed, noise in enumerate((-0.01, 0.0, 0.01, 0.02)):
        for task in ("mrpc", "cola"):
            for budget, label in ((0.3, ""), (0.1, "-0.1")):
                write(tmp_path / task, f"rgft{label}", seed, 0.4, task=task, method="rgft", budget=budget)
                worse = 0.4 + budget / 3 + noise
                write(tmp_path / task, f"lora{label}", seed, worse, task=task, method="lora", budget=budget)
    low, high = verdicts(tmp_path, "rgft", "lora", metric="loss")
    assert (low.budget, high.budget) == (0.1, 0.3)
    assert [round(c.difference, 4) for c in low.by_task.values()] == [0.0383, 0.0383]
    assert {c.verdict for c in high.by_task.values()} == {"better"}
    assert low.together is not None
    assert low.together.difference == pytest.approx(0.1 / 3 + 0.005)
    # Two tasks that agree tell more than one.
    one = next(iter(low.by_task.values()))
    assert low.together.high - low.together.low < one.high - one.low
    (across,) = verdicts(tmp_path, "rgft", "lora", metric="accuracy", against_budget=0.1)[1:]
    assert (across.budget, across.baseline_budget) == (0.3, 0.1)


def test_tasks_with_a_corpus_in_common_count_once() -> None:
    good = compare({0: 1.0, 1: 1.2, 2: 0.9}, {0: 0.5, 1: 0.6, 2: 0.5}, higher_is_better=True)
    bad = compare({0: 0.2, 1: 0.1, 2: 0.3}, {0: 0.5, 1: 0.6, 2: 0.5}, higher_is_better=True)
    assert over_tasks([({"reviews"}, good), ({"reviews", "more"}, good)]) is None
    twice, once = (
        over_tasks([({"reviews"}, good), ({"news"}, bad), ({"more"}, good), ({"reviews", "more"}, good)]),
        over_tasks([({"a"}, good), ({"b"}, bad)]),
    )
    assert twice is not None
    assert once is not None
    assert twice == once


def test_the_interval_over_tasks_covers_the_truth_as_often_as_it_says() -> None:
    import random

    draw, hits, trials = random.Random(0), 0, 600
    for _ in range(trials):
        comparisons = []
        for task, spread in (("a", 0.02), ("b", 0.05), ("c", 0.01)):
            values = {seed: 0.3 + draw.gauss(0, spread) for seed in range(5)}
            comparisons.append(({task}, compare(values, dict.fromkeys(values, 0.0), higher_is_better=True)))
        together = over_tasks(comparisons)
        assert together is not None
        hits += together.low <= 0.3 <= together.high
    assert 0.925 <= hits / trials <= 0.98


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, "rgft", seed, 0.4 + seed)
        write(tmp_path, "lora-0.1", seed, 0.4, method="lora", budget=0.1)
    with pytest.raises(DataError, match="found 'loar'; nearest: lora"):
        verdicts(tmp_path, "rgft", "loar", metric="loss")
    with pytest.raises(DataError, match=r"the same budget; found none\n  SST-2, .*: no final runs of lora at 0\.3"):
        verdicts(tmp_path, "rgft", "lora", metric="loss")
    with pytest.raises(DataError, match="metric 'bleu', found \\['accuracy', 'flops', 'loss', 'seconds'\\]"):
        verdicts(tmp_path, "rgft", "lora", metric="bleu", against_budget=0.1)


def noisy(
    folder: Path, label: str, *, by: float = 0.0, loss_by: float | None = None, seeds: int = 5, **more: Any
) -> None:
    """Runs whose score is higher by `by`, and whose loss is lower by that, or `loss_by`, each up to a bit of noise."""
    for seed in range(seeds):
        noise = (seed - 2) / 2000 * (label != "full")
        loss = 0.4 + seed / 100 - (by if loss_by is None else loss_by) + noise
        metrics = {"test": {"loss": loss, "accuracy": 0.6 - seed / 100 + by + noise}}
        write(folder, label, seed, 0.0, **{"metrics": metrics, **more})


def tuned_full(folder: Path, **more: Any) -> None:
    noisy(folder, "full", budget=1.0, **more)
    write(folder, "full", 100, 0.0, kind="tuning", budget=1.0, **more)


def target(folder: Path, **how: Any) -> Comparison:
    (found,) = verdicts(folder, "rgft", "full", metric="accuracy", against_budget=1.0, **how)
    (comparison,) = found.by_task.values()
    return comparison


@pytest.mark.parametrize(
    ("by", "loss_by", "seeds", "verdict", "why"),
    [
        (-0.001, 0.0, 5, "non-inferior", ""),
        (-0.001, None, 5, "undecided", "held-out loss is worse"),
        (-0.010, None, 5, "worse", ""),
        (-0.0045, 0.0, 5, "worse", ""),
        (0.010, None, 5, "better", ""),
        (-0.001, None, 4, "undecided", "fewer than 5 pairs"),
        (0.010, None, 4, "undecided", "fewer than 5 pairs"),
        (-0.010, None, 4, "undecided", "fewer than 5 pairs"),
        (-0.001, -0.05, 5, "undecided", "held-out loss is worse"),
        (0.010, -0.05, 5, "undecided", "held-out loss is worse"),
        (-0.010, 0.05, 5, "worse", ""),
    ],
)
def test_rgft_beside_tuned_full_fine_tuning(
    tmp_path: Path, by: float, loss_by: float | None, seeds: int, verdict: str, why: str
) -> None:
    noisy(tmp_path, "rgft", by=by, loss_by=loss_by, seeds=seeds)
    tuned_full(tmp_path)
    found = target(tmp_path)
    assert (found.verdict, found.why, found.margin) == (verdict, why, 0.005)
    beside = f"{why}, margin 0.005" if why else "margin 0.005"
    beside += "" if verdict == "undecided" else ", over seeds alone"
    line = next(line for line in markdown(tmp_path).splitlines() if line.startswith("- rgft at 0.3 beside full at 1:"))
    assert line.endswith(f"({seeds} pairs): {verdict} ({beside})")
    full = next(line for line in markdown(tmp_path).splitlines() if line.startswith("| full"))
    assert full.endswith(f"| {verdict} ({beside}) |")


def test_the_target_is_tuned_full_fine_tuning_at_a_higher_budget(tmp_path: Path) -> None:
    noisy(tmp_path, "rgft", by=-0.001, loss_by=0.0)
    noisy(tmp_path, "full", budget=1.0)
    assert target(tmp_path).why == "full fine-tuning is untuned"
    tuned_full(tmp_path)
    assert target(tmp_path).verdict == "non-inferior"
    assert target(tmp_path, margin=0.0).verdict == "worse"
    assert target(tmp_path, margin=0.0).margin == 0.0
    (by_loss,) = verdicts(tmp_path, "rgft", "full", metric="loss", against_budget=1.0)
    assert {comparison.margin for comparison in by_loss.by_task.values()} == {0.0}
    noisy(tmp_path, "full-stopped", method="full")
    noisy(tmp_path, "lora", budget=1.0)
    for baseline, against in (("full-stopped", 0.3), ("lora", 1.0)):
        (found,) = verdicts(tmp_path, "rgft", baseline, metric="accuracy", against_budget=against)
        assert {comparison.margin for comparison in found.by_task.values()} == {0.0}


def test_the_mean_over_tasks_must_not_be_bought_with_loss(tmp_path: Path) -> None:
    for task in ("mrpc", "bbc", "cola"):
        noisy(tmp_path / task, "rgft", by=-0.001, task=task, loss_by=-0.001 if task == "bbc" else 0.0)
        tuned_full(tmp_path / task, task=task)
    (found,) = verdicts(tmp_path, "rgft", "full", metric="accuracy", against_budget=1.0)
    assert found.together is not None
    assert (found.counted, found.together.verdict, found.together.margin) == (3, "non-inferior", 0.005)
    for task in ("mrpc", "cola"):
        noisy(tmp_path / task, "rgft", by=-0.001, task=task, loss_by=-0.05)
    (found,) = verdicts(tmp_path, "rgft", "full", metric="accuracy", against_budget=1.0)
    assert found.together is not None
    assert (found.together.verdict, found.together.why) == ("undecided", "held-out loss is worse")


def test_a_contender_is_the_same_by_method_and_settings_whatever_its_label(tmp_path: Path) -> None:
    noisy(tmp_path / "a", "rgft-1.0", method="rgft", budget=1.0, by=0.01, task="mrpc")
    noisy(tmp_path / "b", "rgft-whole", method="rgft", budget=1.0, by=0.01, task="bbc")
    noisy(tmp_path / "a", "full", budget=1.0, task="mrpc")
    noisy(tmp_path / "b", "full-whole", method="full", budget=1.0, task="bbc")
    noisy(tmp_path / "c", "rgft", budget=1.0, task="cola")
    noisy(tmp_path / "c", "full", budget=1.0, settings={"config": {"granularity": "head"}}, task="cola")
    noisy(tmp_path / "d", "rgft", task="imdb", budget=1.0)
    noisy(tmp_path / "d", "full-stopped", method="full", task="imdb", budget=0.3)
    plain, other = verdicts(tmp_path, "rgft", "full", metric="accuracy")
    assert (plain.baseline, other.baseline) == ("full", 'full {"config": {"granularity": "head"}}')
    titles = {group.title.split(",")[0]: round(c.difference, 3) for group, c in plain.by_task.items()}
    assert titles == {"MRPC": 0.01, "BBC news": 0.01}
    assert {group.title.split(",")[0]: why for group, why in plain.left_out.items()} == {
        "CoLA": "no final runs of full at 1", "IMDB": "no final runs of full at 1",
    }  # fmt: skip
    # The same label on the task is meant, where there are several that are the same but for it.
    noisy(tmp_path / "a", "full-again", method="full", budget=1.0, task="mrpc")
    assert len(verdicts(tmp_path, "rgft", "full", metric="accuracy")[0].by_task) == 2
    left_out = verdicts(tmp_path, "rgft", "full-whole", metric="accuracy")[0].left_out
    assert "full-whole may be full or full-again: give one of these labels" in left_out.values()


def test_tasks_that_lack_the_metric_are_left_out_and_named(tmp_path: Path) -> None:
    for task in ("mrpc", "bbc"):
        noisy(tmp_path / task, "rgft", by=0.01, task=task)
        noisy(tmp_path / task, "lora", task=task)
    for label in ("rgft", "lora"):
        noisy(tmp_path / "words", label, task={"name": "language", "train_size": 9},
              metrics={"test": {"loss": 1.0, "token_accuracy": 0.5}})  # fmt: skip
        noisy(tmp_path / "few", label, task="cola", seeds=1 if label == "rgft" else 3)
    write(tmp_path / "bbc", "lora", 5, 0.4, task="bbc", metrics={"test": {"loss": 0.4}})
    (found,) = verdicts(tmp_path, "rgft", "lora", metric="accuracy")
    assert [group.title for group in found.by_task] == ["MRPC, 2,000 examples, 3 epochs"]
    assert {group.title.split(",")[0]: why for group, why in found.left_out.items()} == {
        "BBC news": "accuracy of lora undefined (1 of 6 seeds)",
        "CoLA": "fewer than two common seeds",
        "language modelling (python)": "accuracy of rgft not measured",
    }
    assert found.together is None
    (by_score,) = verdicts(tmp_path, "rgft", "lora", metric="score")
    assert {group.metric for group in by_score.by_task} == {"accuracy", "token_accuracy"}


def test_compare_says_what_it_left_out_and_the_margin(tmp_path: Path) -> None:
    noisy(tmp_path / "a", "rgft", by=-0.001, loss_by=0.0)
    tuned_full(tmp_path / "a")
    noisy(tmp_path / "b", "rgft", task="mrpc")
    options = ["bench", "compare", "rgft", "full", str(tmp_path), "--metric", "accuracy", "--against", "1"]
    shown = CliRunner().invoke(app, options, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert "non-inferior (margin 0.005, over seeds alone)" in shown.output
    assert "left out: MRPC, 2,000 examples, 3 epochs: no final runs of full at 1\n" in shown.output
    (told,) = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)["budgets"]
    assert told["left_out"] == {"MRPC, 2,000 examples, 3 epochs": "no final runs of full at 1"}
    assert [task["verdict"] for task in told["tasks"].values()] == ["non-inferior"]


def test_of_a_task_whose_rates_were_chosen_twice_the_fitting_choice_is_compared(tmp_path: Path) -> None:
    for task in ("mrpc", "imdb"):
        noisy(tmp_path / task, "rgft", by=0.01, loss_by=-0.01, task=task)
        noisy(tmp_path / task, "lora", task=task)
    noisy(tmp_path / "imdb_by_score", "rgft", by=0.03, loss_by=-0.05, task="imdb", chosen_by="score")
    noisy(tmp_path / "imdb_by_score", "lora", task="imdb", chosen_by="score")
    noisy(tmp_path / "bbc", "rgft", by=0.02, task="bbc", chosen_by="score")  # once only: it stands for either
    noisy(tmp_path / "bbc", "lora", task="bbc", chosen_by="score")
    compared = {
        metric: {
            group.title: round(comparison.difference, 3)
            for group, comparison in verdicts(tmp_path, "rgft", "lora", metric=metric)[0].by_task.items()
        }
        for metric in ("score", "loss")
    }
    imdb, by_score = "IMDB, 2,000 examples, 3 epochs", "IMDB, 2,000 examples, 3 epochs, rates by score"
    assert by_score in compared["score"]
    assert imdb not in compared["score"]
    assert compared["loss"][imdb] == -0.01
    assert by_score not in compared["loss"]
    assert all(len(tasks) == 3 for tasks in compared.values())
    left_out = verdicts(tmp_path, "rgft", "lora", metric="loss")[0].left_out
    assert {group.title: why for group, why in left_out.items()} == {
        by_score: "its rates were chosen by score: the same task with the fitting choice is there"
    }
    # Where the fitting choice has no runs of one of them, the other is what there is.
    for path in (tmp_path / "imdb_by_score").glob("lora--*.json"):
        path.unlink()
    assert imdb in {group.title for group in verdicts(tmp_path, "rgft", "lora", metric="score")[0].by_task}
