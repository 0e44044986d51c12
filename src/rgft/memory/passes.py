"""Batches in pieces: fewer rows at once, for the same gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def pieces(batch: Mapping[str, Any], rows: int) -> Iterator[tuple[range, Mapping[str, Any]]]:
    """The batch in pieces of at most `rows` rows, each with which rows of it they are.

    Padding stays as it is, so that the pieces cost what the batch would.

    Args:
        batch: tensors whose first dimension is the batch's are cut, all else is handed on.
        rows: at most so many.
    """
    whole = len(next(value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0))
    for start in range(0, whole, rows):
        chosen = range(start, min(start + rows, whole))
        yield (
            chosen,
            {
                key: value[chosen.start : chosen.stop]
                if isinstance(value, Tensor) and value.dim() > 0 and len(value) == whole
                else value
                for key, value in batch.items()
            },
        )
