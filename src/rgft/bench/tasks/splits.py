"""Splits that are the same for all runs and seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def shuffled(rows: Sequence[T], *, name: str, test: int, validation: int) -> dict[str, list[T]]:
    """Shuffles rows by the name of their task, and takes the first for testing and the next for validation."""
    drawn = random.Random(name).sample(rows, len(rows))
    return {"test": drawn[:test], "validation": drawn[test : test + validation], "train": drawn[test + validation :]}
