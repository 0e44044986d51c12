"""Causal language modelling of plain texts."""

from __future__ import annotations

import logging
from typing import Any

from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.files import read_rows
from rgft.tasks.models import load_tokenizer
from rgft.tasks.split import stratified
from rgft.tasks.token_task import token_task

log = logging.getLogger("rgft")

Example = dict[str, list[int]]


def language_modelling(
    *, model: str, train: str, text: str = "text", validation: str | None = None, test: str | None = None,
    packing: bool = True, max_length: int = 512, held_out: float = 0.1, seed: int = 0,
) -> PreparedTask:  # fmt: skip
    """Prepares next-token prediction.

    Args:
        model: hub name or folder of a decoder, or a `.gguf` file.
        train, validation, test: files (`.txt`: texts separated by blank lines) or hub names. Without `validation`,
            `held_out` of the training texts is held out, equal texts staying on one side.
        text: column with the texts.
        packing: texts, each ended by the end-of-text token, are joined and cut into blocks of `max_length` tokens, the
            last block being shorter; texts in one block attend to those before them, as is usual. Else each text is an
            example, cut at `max_length`, and the number of cut ones is logged.
        max_length: tokens of an example.
        held_out: share of the training texts for validation where no file is given.
        seed: of the split.

    Raises:
        DataError: a file, column or model cannot be used.
    """
    texts = {"train": _texts(train, text, "train")}
    for split, source in (("validation", validation), ("test", test)):
        if source is not None:
            texts[split] = _texts(source, text, split)
    if "validation" not in texts:
        texts["train"], texts["validation"] = stratified(
            texts["train"], key=lambda t: t, label=lambda t: 0, held_out=held_out, seed=seed
        )
    tokenizer = load_tokenizer(model)
    data: dict[str, list[Example]] = {}
    for split, some in texts.items():
        ids = _encoded(some, tokenizer)
        examples = packed(ids, max_length) if packing else _cut(ids, max_length, split)
        data[split] = [{"input_ids": example, "labels": example} for example in examples if len(example) > 1]
        if len(data[split]) < len(examples):
            log.warning(
                "%s: %d of %d examples are single tokens, which predict nothing, and are left out", split,
                len(examples) - len(data[split]), len(examples),
            )  # fmt: skip
        if not data[split]:
            raise DataError(f"{split}: expected texts of at least two tokens in all, found none")
    return token_task(model, tokenizer, data)


def _texts(source: str, column: str, split: str) -> list[str]:
    rows = read_rows(source, [column], split=split)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(
                f"{source}, row {number}: expected a text in column {column!r}, found {row[column]!r}; remove or fill "
                "such rows"
            )
    return [row[column] for row in rows]


def _encoded(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens, ended by the end-of-text token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token, which ends each text; set its eos_token and save it")
    encoded: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in encoded]


def packed(texts: list[list[int]], length: int) -> list[list[int]]:
    """All texts joined, in blocks of `length` tokens; the last may be shorter."""
    joined = [token for ids in texts for token in ids]
    return [joined[start : start + length] for start in range(0, len(joined), length)]


def _cut(texts: list[list[int]], length: int, split: str) -> list[list[int]]:
    too_long = sum(len(ids) > length for ids in texts)
    if too_long:
        log.warning("%s: %d of %d texts are longer than %d tokens and are cut", split, too_long, len(texts), length)
    return [ids[:length] for ids in texts]
