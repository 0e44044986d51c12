"""Language modelling with the packaged decoder: short sequences of Python or of news, and texts of the user's.

Sequences are short because a step on two cores takes seconds: 256 sequences of 40 tokens are 8.3 TFLOP of full
fine-tuning an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rgft.bench.tasks import news
from rgft.bench.tasks.packaged import decoder
from rgft.bench.tasks.python_corpus import functions
from rgft.bench.tasks.splits import apart, drawn, packaged_or_own, some_of
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.files import read_rows
from rgft.tasks.models import load_tokenizer
from rgft.tasks.token_task import token_task

Ids = tuple[int, ...]


def language(
    *, train_size: int, seed: int, tokens: int = 40, corpus: str = "python", model: str = "smollm2",
    validation: str | None = None, test: str | None = None, text: str = "text", test_size: int = 160,
    validation_size: int = 64,
) -> PreparedTask:  # fmt: skip
    """Next-token prediction on the beginnings of texts; the loss is per token.

    Args:
        train_size: sequences, drawn from what is not held out.
        seed: of the draw; validation and test are the same for all.
        tokens: of each sequence; shorter texts are left out, so that there is no padding.
        corpus: "python" (functions of Python's standard library, split by module), "bbc" (the packaged news), or a
            file or hub name of the user's (see `read_rows`).
        model: "smollm2" (packaged), a hub name, a folder or a `.gguf` file.
        validation, test: files or hub names, with a corpus of the user's; both are then needed.
        text: column with the texts, in a corpus of the user's.
        test_size, validation_size: sequences that are evaluated; there may be fewer.

    Raises:
        DataError: a package, a file or the model is missing, or there are fewer sequences than `train_size`.
    """
    if tokens < 2:
        raise DataError(f"tokens: expected at least 2, of which the second is predicted, found {tokens}")
    texts = packaged_or_own(
        "corpus", corpus, validation, test, packaged={"python": functions, "bbc": _news_texts},
        read=lambda source, split: [str(row[text]) for row in read_rows(source, [text], split=split)],
    )  # fmt: skip
    tokenizer = load_tokenizer(decoder(model))
    splits = _sequences(tokenizer, texts, tokens)
    rows = {
        "train": drawn(splits["train"], train_size, seed=seed, what=f"sequences of {tokens} tokens"),
        "validation": some_of(splits["validation"], validation_size, name="validation"),
        "test": some_of(splits["test"], test_size, name="test"),
    }
    for split, some in rows.items():
        if not some:
            raise DataError(f"{split}: expected texts of at least {tokens} tokens, found none; lower tokens")
    examples = {split: [{"input_ids": list(ids), "labels": list(ids)} for ids in some] for split, some in rows.items()}
    return token_task(decoder(model), tokenizer, examples)


@cache
def _news_texts() -> Mapping[str, Sequence[str]]:
    splits, _ = news.bbc_splits()
    return {split: [text for text, _ in rows] for split, rows in splits.items()}


def _sequences(tokenizer: Any, texts: Mapping[str, Sequence[str]], tokens: int) -> dict[str, list[Ids]]:
    """The first tokens of each text that has so many; none twice."""
    ids = {
        split: [
            tuple(encoded[:tokens])
            for encoded in tokenizer(list(some), truncation=True, max_length=tokens)["input_ids"]
            if len(encoded) >= tokens
        ]
        for split, some in texts.items()
    }
    return apart(ids, key=lambda sequence: sequence)
