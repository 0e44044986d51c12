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
        largest = max((len(members) for members in by_label.values()), default=0)
        raise DataError(
            f"{_why_not(len(rows), len(groups), len(by_label), largest, held_out)}; give validation data "
            "(--validation), more examples, or another share (held_out)"
        )
    return first, second


def _why_not(rows: int, different: int, labels: int, largest: int, held_out: float) -> str:
    """Why a part is empty.

    Args:
        rows: how many there are.
        different: how many of them differ.
        labels: how many there are.
        largest: how many different rows the most frequent label has.
        held_out: share of the second part.
    """
    share = f"{held_out:.0%}"
    if rows > 1 and different == 1:
        return f"expected examples that differ, of which {share} are held out; found the same one in all {rows} rows"
    if labels > 1 and 0 < round(held_out * different) < different:
        return (
            f"expected labels that have enough examples to hold out {share} of each; found {labels} labels with at "
            f"most {largest} different examples each, in {rows} rows (is this the column with labels?)"
        )
    return f"{different} different examples (in {rows} rows) are too few to hold out {share} of them"
