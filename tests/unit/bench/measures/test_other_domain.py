"""Texts from elsewhere: what training has seen is left out, also as a part."""

import pytest

from rgft.bench.measures.other_domain import SOURCES, other_domain
from rgft.bench.measures.overlap import found_again
from rgft.errors import ConfigError
from tests.unit.bench.tiny_texts import tiny_task


def test_common_runs_of_tokens_and_short_texts_that_are_parts() -> None:
    texts = [[99, *range(3, 11), 99], [99, *range(3, 10), 99, 99], [51, 52], [52, 51], [1, 3]]
    # Eight in common, seven, a part, its parts the other way round, parts that are apart there.
    found = found_again(texts, iter([list(range(20)), [50, 51, 52]]), run=8)
    assert found == [True, False, True, False, False]


def test_training_texts_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    own = [(task.train[i]["input_ids"], task.label_names[task.train[i]["labels"]]) for i in range(3)]
    new = [([2, *[7] * 9, 3], "good"), ([2, 8, 3], "no such label")]
    monkeypatch.setitem(SOURCES, "imdb", lambda tokenizer: [*own, *new])  # type: ignore[misc]
    examples, left_out = other_domain("imdb", task)
    assert examples == [{"input_ids": [2, *[7] * 9, 3], "labels": task.label_names.index("good")}]
    assert left_out == {"seen": 3, "without": 1}


def test_labels_that_the_task_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "imdb", lambda tokenizer: [([2, 7, 3], "sports")])  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"bad, good.*sports"):
        other_domain("imdb", tiny_task())
