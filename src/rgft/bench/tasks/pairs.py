"""Pairs of a right program and a wrong one that is nearly the same, and the tokens in which they differ.

What FAIT learns from (Fan et al. 2025, arXiv:2503.16913). There a large model writes the wrong programs; here one place
of the right one is changed. What is wrong is found by running the problem's tests, in a limited process.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rgft.bench.tasks.limited_process import Limits, Outcome, Program, run_all
from rgft.bench.tasks.mutants import mutants
from rgft.bench.tasks.problems import Problem
from rgft.tasks.token_loss import TokenCollator

log = logging.getLogger("rgft")

#: Key of a batch: which positions [B, T] hold error-sensitive tokens.
SENSITIVE = "error_sensitive"

#: Changes of each program that are tried.
TRIES = 4


@cache
def wrong_variants(problems: tuple[Problem, ...], limits: Limits) -> Mapping[Problem, tuple[str, ...]]:
    """Of each problem continuations that fail its tests, each of which differs from its solution in one place.

    Which changes are tried is drawn by lot, the same way in every run. A program that runs out of time or memory is not
    taken for wrong: whether it does depends on the machine. Problems whose own solution fails, or all of whose changes
    pass, are left out.

    Args:
        problems: with tests.
        limits: of each program that is run.

    Raises:
        RGFTError: see `run_all`.
    """
    solved = [problem for problem, _, outcome in _run([(p, p.solution) for p in problems], limits) if outcome.passed]
    found: dict[Problem, tuple[str, ...]] = {}
    for problem, text, outcome in _run([(p, text) for p in solved for text in _changed(p)], limits):
        if outcome.is_error:
            found[problem] = (*found.get(problem, ()), text)
    if len(found) < len(problems):
        log.info("%d of %d programs have no wrong variant and are left out", len(problems) - len(found), len(problems))
    return found


def _changed(problem: Problem) -> list[str]:
    candidates = mutants(problem.prompt, problem.solution)
    return random.Random(problem.prompt).sample(candidates, min(TRIES, len(candidates)))


def _run(rows: Sequence[tuple[Problem, str]], limits: Limits) -> Iterator[tuple[Problem, str, Outcome]]:
    programs = [Program(code=problem.prompt + text, test=problem.test) for problem, text in rows]
    outcomes = run_all(programs, limits=limits)
    return ((problem, text, outcome) for (problem, text), outcome in zip(rows, outcomes, strict=True))


def error_sensitive_tokens(correct: Sequence[int], variants: Sequence[Sequence[int]], tokenizer: Any) -> list[bool]:
    """Which tokens of the correct program one of the incorrect ones lacks or has otherwise; see `error_sensitive`.

    Args:
        correct, variants: token ids of the correct program, and of each incorrect one.
        tokenizer: that made them.
    """
    lines = _lines(correct, tokenizer)
    marks = [error_sensitive(lines, _lines(variant, tokenizer)) for variant in variants]
    return [any(of_token) for of_token in zip(*marks, strict=True)]


def error_sensitive(correct: Sequence[Sequence[int]], incorrect: Sequence[Sequence[int]]) -> list[bool]:
    """Which tokens of the correct program are in lines that the incorrect one has not, and differ from those it has.

    Args:
        correct, incorrect: token ids of each line.

    Returns:
        One entry for each token of the correct program, lines one after the other.
    """
    sensitive = [[False] * len(line) for line in correct]
    lines = _changes([tuple(line) for line in correct], [tuple(line) for line in incorrect])
    for start, stop, theirs, their_stop in lines:
        mine = [token for line in correct[start:stop] for token in line]
        marks = [False] * len(mine)
        for first, last, _, _ in _changes(mine, [token for line in incorrect[theirs:their_stop] for token in line]):
            marks[first:last] = [True] * (last - first)
        for number in range(start, stop):
            sensitive[number], marks = marks[: len(correct[number])], marks[len(correct[number]) :]
    return [mark for line in sensitive for mark in line]


def _changes(mine: Sequence[Hashable], theirs: Sequence[Hashable]) -> list[tuple[int, int, int, int]]:
    """Stretches of `mine` that `theirs` has otherwise or not at all, and what it has there."""
    codes = SequenceMatcher(a=mine, b=theirs, autojunk=False).get_opcodes()
    return [(i, j, k, m) for tag, i, j, k, m in codes if tag in ("replace", "delete")]


def _lines(ids: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """The ids of each line; a token with a line break in it is the last of its line."""
    lines: list[list[int]] = [[]]
    for token in ids:
        lines[-1].append(token)
        if "\n" in tokenizer.decode([token]):
            lines.append([])
    return lines


class PairCollator(TokenCollator):
    """Batches with `error_sensitive` [B, T] beside what batches of tokens have: False in padding and without pair."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        sensitive_BT = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, example in enumerate(examples):
            marks = example.get(SENSITIVE, ())
            sensitive_BT[row, : len(marks)] = torch.tensor(marks, dtype=torch.bool)
        return {**batch, SENSITIVE: sensitive_BT}
