"""Which texts are found again among others: what is measured on must not have been trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence


def found_again(
    texts: Sequence[Sequence[Hashable]], others: Iterable[Sequence[Hashable]], *, run: int
) -> list[bool]:  # fmt: skip
    """Which texts have a run of items in common with one of the others, or, being shorter, are part of one.

    Args:
        texts: words or token ids of each.
        others: likewise; read once.
        run: how many items in a row make a text one that is there.
    """
    holders: dict[int, dict[tuple[Hashable, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    for number, text in enumerate(texts):
        length = min(run, len(text))
        for items in _runs(text, length):
            holders[length][items].add(number)
    again: set[int] = set()
    for other in others:
        for length, numbers in holders.items():
            for items in _runs(other, length):
                again |= numbers.get(items, set())
    return [number in again for number in range(len(texts))]


def _runs(items: Sequence[Hashable], length: int) -> Iterator[tuple[Hashable, ...]]:
    return (tuple(items[start : start + length]) for start in range(len(items) - length + 1))
