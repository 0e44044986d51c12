from pathlib import Path

import pytest

from rgft.bench.statistics import compare, over_tasks
from rgft.bench.verdict import verdicts
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
    with pytest.raises(DataError, match="the same budget; found none"):
        verdicts(tmp_path, "rgft", "lora", metric="loss")
    with pytest.raises(DataError, match="metric 'bleu', found \\['accuracy', 'loss'\\]"):
        verdicts(tmp_path, "rgft", "lora", metric="bleu", against_budget=0.1)
