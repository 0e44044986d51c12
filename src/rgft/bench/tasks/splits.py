"""Splits that are the same for all runs and seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from rgft.errors import DataError

T = TypeVar("T")


def shuffled(rows: Sequence[T], *, name: str, test: int, validation: int) -> dict[str, list[T]]:
    """Shuffles rows by the name of their task, and takes the first for testing and the next for validation."""
    drawn = random.Random(name).sample(rows, len(rows))
    return {"test": drawn[:test], "validation": drawn[test : test + validation], "train": drawn[test + validation :]}


def apart(splits: Mapping[str, Sequence[T]], *, key: Callable[[T], Hashable]) -> dict[str, list[T]]:
    """Each row once, in the first of test, validation and train that has it: nothing that is held out is trained on.

    Args:
        splits: by name; the order of rows is kept.
        key: what makes two rows the same example.
    """
    seen: set[Hashable] = set()
    kept: dict[str, list[T]] = {}
    for name in ("test", "validation", "train"):
        kept[name] = []
        for row in splits[name]:
            if key(row) not in seen:
                seen.add(key(row))
                kept[name].append(row)
    return kept


def packaged_or_own(
    setting: str, source: str, validation: str | None, test: str | None, *,
    packaged: Mapping[str, Callable[[], Mapping[str, Sequence[T]]]], read: Callable[[str, str], Sequence[T]],
) -> Mapping[str, Sequence[T]]:  # fmt: skip
    """The splits of a packaged data set, by its name, or of the user's own three sources.

    Args:
        setting: that names the source, for messages.
        source: a packaged name, or the file or hub name of training data.
        validation, test: of the user's own data.
        packaged: name → its splits.
        read: (source, split) → its rows.

    Raises:
        DataError: splits are missing, or given beside a packaged name.
    """
    if source in packaged:
        if validation is not None or test is not None:
            raise DataError(f"validation and test: expected only with {setting} of your own; {source!r} has its splits")
        return packaged[source]()
    if validation is None or test is None:
        raise DataError(
            f"{setting} {source!r}: expected {', '.join(packaged)}, or a file or hub name together with validation and "
            "test"
        )
    return {split: read(file, split) for split, file in (("train", source), ("validation", validation), ("test", test))}


def drawn(rows: Sequence[T], size: int, *, seed: int, what: str) -> list[T]:
    """Training rows of one run.

    Args:
        rows: what is drawn from.
        size: how many.
        seed: of the draw.
        what: the rows are, for the message.

    Raises:
        DataError: there are fewer.
    """
    if not 1 <= size <= len(rows):
        raise DataError(f"train_size: expected 1 to {len(rows)} {what}, found {size}")
    return random.Random(f"train/{seed}").sample(rows, size)


def some_of(rows: Sequence[T], size: int | None, *, name: str) -> list[T]:
    """The same `size` rows in every run, or all of them."""
    if size is None or size >= len(rows):
        return list(rows)
    return random.Random(name).sample(rows, size)
