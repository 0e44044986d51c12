"""Changes of one token: what is changed, what never is, and that all else stays as it was written."""

from __future__ import annotations

import ast

import pytest

from rgft.bench.tasks.mutants import mutants

PROMPT = 'def f(first, second):\n    """Adds 1 and 2 < 3."""\n'


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ("    return first + 0\n", {"second + 0", "first - 0", "first + 1"}),
        ("    return first < 7\n", {"second < 7", "first <= 7", "first < 8", "first < 6"}),
        ("    return True and x.first\n", {"False and x.first", "True or x.first"}),
        ("    return 'é', first\n", {"'é', second"}),  # columns of bytes are not those of characters
        ("    return 'first + 1'  # first + 1\n", set()),
    ],
)
def test_one_token_is_changed(body: str, changed: set[str]) -> None:
    found = mutants(PROMPT, body)
    head = "    return "
    assert {text.removeprefix(head).rstrip("\n") for text in found} == changed
    for text in found:
        ast.parse(PROMPT + text)


def test_names_are_changed_where_they_are_read_and_nothing_is_that_does_not_parse() -> None:
    body = (
        "    total = first\n    for item in second:\n        total += item.count(*first, first=1)\n    return total\n"
    )
    found = mutants(PROMPT, body)
    assert all(len(text.splitlines()) == 4 for text in found)
    assert any("total -= item" in text for text in found)
    assert any("return first" in text for text in found)  # the next of first, item, second, total
    assert not any(word in text for text in found for word in ("def ", "second=1", "    second = "))
