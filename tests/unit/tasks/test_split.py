"""Splitting rows, and what is said where they cannot be split."""

from __future__ import annotations

import pytest

from rgft.errors import DataError
from rgft.tasks.split import stratified


def split(rows: list[tuple[str, int]], held_out: float = 0.1) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    return stratified(rows, key=lambda row: row[0], label=lambda row: row[1], held_out=held_out, seed=0)


def test_each_label_in_proportion() -> None:
    train, validation = split([(f"text {i}", int(i < 20)) for i in range(60)])
    assert [sum(label for _, label in part) for part in (train, validation)] == [18, 2]
    assert (len(train), len(validation)) == (54, 6)


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        (
            [(f"text {i}", i) for i in range(120)],
            0.1,
            "found 120 labels with at most 1 different examples each, in 120 ",
        ),
        ([("text", i % 2) for i in range(120)], 0.1, "found the same one in all 120 rows; give validation data"),
        (
            [(f"text {i}", i % 2) for i in range(4)],
            0.1,
            r"4 different examples \(in 4 rows\) are too few to hold out 10%",
        ),
        ([("one", 0)], 0.1, r"1 different examples \(in 1 rows\) are too few to hold out 10%"),
        ([("one", 0), ("two", 0)], 0.9, "2 different examples .* are too few to hold out 90%"),
    ],
)
def test_the_reason_why_nothing_can_be_held_out(rows: list[tuple[str, int]], held_out: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(rows, held_out)
