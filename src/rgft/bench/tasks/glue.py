"""GLUE's tasks (Wang et al. 2019), from a folder of its files: their test labels are not public, so all split anew."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from rgft.bench.tasks.labelled import Answered
from rgft.bench.tasks.splits import shuffled
from rgft.bench.tasks.superglue import SOURCES, Source
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import Labelled, encoder_task
from rgft.tasks.files import read_rows
from rgft.tasks.metrics import OfWholeSplit

#: Environment variable with the folder of data sets that come in no package: GLUE's, as SST-2/train.tsv and so on.
DATA_FOLDER = "RGFT_BENCH_DATA"

TEST_SIZE, VALIDATION_SIZE = 2500, 1000

#: Shorter phrases are no sentences to test on.
MIN_WORDS = 8


def sst2(*, train_size: int, seed: int) -> PreparedTask:
    """SST-2 (Socher et al. 2013) as GLUE has it, with the packaged encoder.

    GLUE's training set is phrases cut out of sentences, and its test labels are not public. Here sentences are held
    out, and every phrase that is part of one of them is left out of the training set. Its reviews are those of Rotten
    Tomatoes: never count the two as independent.

    Args:
        train_size: phrases, drawn from what is not held out.
        seed: of the draw and of the new classifier.

    Raises:
        DataError: the folder of data sets is not named, or lacks the file.
    """
    return encoder_task(_sst2_splits(_data_folder() / "SST-2" / "train.tsv"), train_size=train_size, seed=seed)


def cola(*, train_size: int, seed: int) -> PreparedTask:
    """CoLA (Warstadt et al. 2019): whether a sentence is grammatical; arguments and errors as `sst2`.

    GLUE's test labels are not public: training and development set are split anew.
    """
    return _scored(
        encoder_task(_cola_splits(_data_folder() / "CoLA"), train_size=train_size, seed=seed), SOURCES["cola"]
    )


def mrpc(*, train_size: int, seed: int) -> PreparedTask:
    """MRPC (Dolan and Brockett 2005): whether two sentences say the same; arguments and errors as `sst2`.

    GLUE's training and development set are split anew; a pair that shares a sentence with one held out is left out.
    """
    return _scored(
        encoder_task(_mrpc_splits(_data_folder() / "MRPC"), train_size=train_size, seed=seed), SOURCES["mrpc"]
    )


def _scored(task: PreparedTask, source: Source) -> PreparedTask:
    """The task with GLUE's own metrics of it."""

    def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
        return source.scores(Answered.one_by_one(logits, labels))

    task.metric, task.primary_metric = partial(OfWholeSplit, scores), source.primary
    return task


@cache
def _cola_splits(folder: Path) -> dict[str, Labelled]:
    rows = [row for name in ("train", "dev") for row in _tab_separated(folder / f"{name}.tsv", columns=4)]
    labelled = {text.strip(): int(label) for _, label, _, text in rows}
    return shuffled(sorted(labelled.items()), name="cola", test=2500, validation=1000)


@cache
def _mrpc_splits(folder: Path) -> dict[str, list[tuple[tuple[str, str], int]]]:
    rows = [row for name in ("train", "dev") for row in _tab_separated(folder / f"{name}.tsv", columns=5)[1:]]
    labelled = {(first.strip(), second.strip()): int(label) for label, _, _, first, second in rows}
    splits = shuffled(sorted(labelled.items()), name="mrpc", test=1000, validation=500)
    held = {sentence for name in ("test", "validation") for pair, _ in splits[name] for sentence in pair}
    splits["train"] = [(pair, label) for pair, label in splits["train"] if not held.intersection(pair)]
    return splits


def _tab_separated(path: Path, *, columns: int) -> list[list[str]]:
    """Rows of a file of GLUE's, whose quotation marks are text.

    Raises:
        DataError: it is missing, or a row has another number of columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'} there")
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines() if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise DataError(f"{path}, line {number}: expected {columns} columns, found {len(row)}")
    return rows


def _data_folder() -> Path:
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        raise DataError(f"set the environment variable {DATA_FOLDER} to a folder with GLUE's data (SST-2/train.tsv, …)")
    return Path(folder).expanduser()


@cache
def _sst2_splits(path: Path) -> dict[str, Labelled]:
    rows = read_rows(str(path), ["sentence", "label"])
    phrases = {row["sentence"].strip(): int(row["label"]) for row in rows}
    return held_out_sentences(phrases, test=TEST_SIZE, validation=VALIDATION_SIZE)


def held_out_sentences(phrases: Mapping[str, int], *, test: int, validation: int) -> dict[str, Labelled]:
    """Splits phrases so that none in training is part of a held-out sentence, nor has one as a part.

    Args:
        phrases: text → label.
        test, validation: sentences to hold out.

    Raises:
        DataError: there are not that many sentences.
    """
    sentences = _sentences(phrases)
    if len(sentences) <= test + validation:
        raise DataError(f"expected more than {test + validation} sentences, found {len(sentences)}")
    random.Random("sst-2").shuffle(sentences)
    held = sentences[: test + validation]
    everything = "\n".join(f" {sentence} " for sentence in held)
    train = [(p, label) for p, label in phrases.items() if f" {p} " not in everything]
    return {
        "test": [(s, phrases[s]) for s in held[:test]],
        "validation": [(s, phrases[s]) for s in held[test:]],
        "train": train,
    }


def _sentences(phrases: Mapping[str, int]) -> list[str]:
    """Phrases of at least MIN_WORDS words that are part of no other, sorted."""
    longest_first = sorted(phrases, key=lambda p: (-len(p), p))
    starts: dict[tuple[str, ...], list[str]] = {}  # each run of MIN_WORDS words → the sentences that have it
    found: list[str] = []
    for phrase in longest_first:
        words = phrase.split()
        if len(words) < MIN_WORDS:
            continue
        first = tuple(words[:MIN_WORDS])
        if any(f" {phrase} " in f" {sentence} " for sentence in starts.get(first, ())):
            continue
        found.append(phrase)
        for place in range(len(words) - MIN_WORDS + 1):
            starts.setdefault(tuple(words[place : place + MIN_WORDS]), []).append(phrase)
    return sorted(found)
