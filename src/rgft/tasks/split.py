"""Splitting rows into training, validation and test sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from rgft.errors import DataError

T = TypeVar("T")


def stratified(
    rows: Sequence[T], *, key: Callable[[T], Hashable], label: Callable[[T], Hashable], held_out: float, seed: int
) -> tuple[list[T], list[T]]:
    """Splits rows in two, each label in the same proportion; rows with the same `key` stay together.

    Args:
        rows: what is split.
        key: what makes two rows the same example (its text), so that none is on both sides.
        label: what is kept in proportion.
        held_out: share of the second part.
        seed: of the draw.

    Raises:
        DataError: a part would be empty.
    """
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    by_label: dict[Hashable, list[list[T]]] = {}
    for group in groups.values():
        by_label.setdefault(label(group[0]), []).append(group)
    first: list[T] = []
    second: list[T] = []
    for name in sorted(by_label, key=repr):
        members = by_label[name]
        random.Random(f"{seed}/{name!r}").shuffle(members)
        count = round(held_out * len(members))
        second += [row for group in members[:count] for row in group]
        first += [row for group in members[count:] for row in group]
    if not first or not second:
        raise DataError(f"{len(rows)} rows are too few to hold out {held_out:.0%} of them; give a file of its own")
    return first, second
