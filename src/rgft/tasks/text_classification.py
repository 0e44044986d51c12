"""Text classification and regression from labelled rows with one or two text columns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.errors import DataError
from rgft.tasks import metrics
from rgft.tasks.base import PreparedTask
from rgft.tasks.files import Row, read_rows
from rgft.tasks.models import load_classifier, load_tokenizer, require_positions
from rgft.tasks.split import stratified

log = logging.getLogger("rgft")


def text_classification(
    *, model: str, train: str, text: Sequence[str] = ("text",), label: str = "label", validation: str | None = None,
    test: str | None = None, regression: bool = False, max_length: int = 128, held_out: float = 0.1, seed: int = 0,
) -> PreparedTask:  # fmt: skip
    """Prepares classification (or regression) of texts or pairs of texts.

    Args:
        model: hub name or folder of a pre-trained model.
        train, validation, test: files or hub names. Without `validation`, `held_out` of the training rows is held out,
            stratified by label, texts that occur twice staying on one side.
        text: one or two columns.
        label: column with the label: any strings or integers for classification, numbers for regression.
        regression: whether labels are numbers to be predicted.
        max_length: tokens; longer inputs are cut, and their number is logged.
        held_out: share of the training rows for validation where no file is given.
        seed: of the split and of new weights.

    Raises:
        DataError: a file, column, label or model cannot be used.
    """
    if not 1 <= len(text) <= 2:
        raise DataError(f"text: expected one or two columns, found {len(text)}: {', '.join(text) or 'none'}")
    if len(set(text)) < len(text):
        raise DataError(f"text: expected two different columns, found {text[0]!r} twice; give it once, or another one")
    if label in text:
        raise DataError(
            f"label: expected another column than the texts', found {label!r} for both; give the one with labels by "
            "--label and the one with texts by --text"
        )
    columns = [*text, label]
    rows = {"train": _checked(train, read_rows(train, columns), text, label)}
    for split, source in (("validation", validation), ("test", test)):
        if source is not None:
            rows[split] = _checked(source, read_rows(source, columns, split=split), text, label)
    parse, names = _numbers() if regression else _classes(train, rows["train"], label)
    for split, source in (("train", train), ("validation", validation), ("test", test)):
        for number, row in enumerate(rows.get(split, ()), start=1):
            row[label] = parse(str(source), number, row[label])
    if "validation" not in rows:
        rows["train"], rows["validation"] = stratified(
            rows["train"], key=lambda row: tuple(row[column] for column in text), held_out=held_out, seed=seed,
            label=(lambda row: 0) if regression else (lambda row: row[label]),
        )  # fmt: skip
    tokenizer = load_tokenizer(model)
    data = {split: _encoded(some, tokenizer, text, label, max_length, where=split) for split, some in rows.items()}
    settings: dict[str, Any] = {"problem_type": "regression"} if regression else {
        "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}
    }  # fmt: skip
    network = load_classifier(
        model, labels=1 if regression else len(names), seed=seed, pad_token_id=tokenizer.pad_token_id, **settings
    )
    require_positions(network, max(len(example["input_ids"]) for split in data.values() for example in split))
    return PreparedTask(
        model=network, processor=tokenizer, train=data["train"], validation=data["validation"], test=data.get("test"),
        collate=partial(collate, tokenizer), loss=regression_loss if regression else classification_loss,
        metric=partial(metrics.OfWholeSplit, metrics.regression if regression else metrics.classification),
        primary_metric="mse" if regression else "accuracy", label_names=names,
    )  # fmt: skip


def _checked(source: str, rows: list[Row], text: Sequence[str], label: str) -> list[Row]:
    """Rows whose texts are texts and whose label is there."""
    for number, row in enumerate(rows, start=1):
        for column in text:
            if not isinstance(row[column], str) or not row[column].strip():
                raise DataError(
                    f"{source}, row {number}: expected a text in column {column!r}, found {row[column]!r}; "
                    "remove or fill such rows"
                )
        if row[label] is None or row[label] == "":
            raise DataError(f"{source}, row {number}: expected a label in column {label!r}, found {row[label]!r}")
    return rows


def _classes(source: str, rows: list[Row], label: str) -> tuple[Callable[[str, int, Any], int], tuple[str, ...]]:
    values = {_class_of(source, number, row[label]) for number, row in enumerate(rows, start=1)}
    if len(values) < 2:
        raise DataError(f"{source}: expected at least two classes in column {label!r}, found {sorted(values)}")
    names = tuple(sorted(values, key=lambda v: (0, int(v), v) if v.lstrip("-").isdigit() else (1, 0, v)))
    index = {name: i for i, name in enumerate(names)}

    def parse(where: str, row: int, value: Any) -> int:
        name = _class_of(where, row, value)
        if name not in index:
            raise DataError(
                f"{where}, row {row}: the label {name!r} does not occur in the training data "
                f"(its labels: {', '.join(names)})"
            )
        return index[name]

    return parse, names


def _class_of(where: str, row: int, value: Any) -> str:
    """The class that a label names.

    Raises:
        DataError: it names none.
    """
    name = str(value)
    if isinstance(value, (list, tuple, Mapping, bytes)) or not name.strip():
        raise DataError(f"{where}, row {row}: expected a label (a text or a number), found {value!r}")
    if name.strip().lower() in ("nan", "<na>"):
        # What writes tables puts these where a value is missing: there is no telling them from a class of that name.
        raise DataError(
            f"{where}, row {row}: expected a label, found {value!r}, which stands for a missing value; fill or remove "
            "such rows, or where it is a class, write it otherwise, as 'not-a-number'"
        )
    return name


def _numbers() -> tuple[Callable[[str, int, Any], float], tuple[str, ...]]:
    def parse(where: str, row: int, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or number in (float("inf"), float("-inf")):
            raise DataError(f"{where}, row {row}: expected a number as label, found {value!r}")
        return number

    return parse, ()


def _encoded(
    rows: list[Row], tokenizer: Any, text: Sequence[str], label: str, max_length: int, *, where: str
) -> list[dict[str, Any]]:  # fmt: skip
    columns = [[row[column] for row in rows] for column in text]
    full = tokenizer(*columns)["input_ids"]
    cut = sum(len(ids) > max_length for ids in full)
    if cut:
        log.warning("%s: %d of %d examples are longer than %d tokens and are cut", where, cut, len(rows), max_length)
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded]
    return [{**{key: encoded[key][i] for key in keys}, "labels": row[label]} for i, row in enumerate(rows)]


def collate(tokenizer: Any, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads to the longest of the batch, on the tokenizer's side; labels become a tensor."""
    inputs = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    batch = dict(tokenizer.pad(inputs, return_tensors="pt"))
    batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def classification_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example, [B]."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def regression_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Squared error of each example, [B]."""
    outputs = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return (outputs.float().squeeze(-1) - batch["labels"].float()).square()
