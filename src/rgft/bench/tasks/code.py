"""Code generation: functions are learnt from their docstrings; what is written for problems is run on their tests."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from rgft.bench.tasks.generation import completions
from rgft.bench.tasks.limited_process import Limits, run_all
from rgft.bench.tasks.packaged import decoder
from rgft.bench.tasks.pairs import SENSITIVE, PairCollator, error_sensitive_tokens, wrong_variants
from rgft.bench.tasks.pass_at_k import mean_pass_at_k
from rgft.bench.tasks.problems import Problem, read_problems
from rgft.bench.tasks.python_corpus import function_splits
from rgft.bench.tasks.splits import apart, drawn, shuffled, some_of
from rgft.errors import ConfigError, DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.files import read_rows
from rgft.tasks.models import load_tokenizer
from rgft.tasks.split import stratified
from rgft.tasks.token_loss import IGNORED
from rgft.tasks.token_task import token_task

log = logging.getLogger("rgft")

T = TypeVar("T")


class Learnt(NamedTuple):
    """What is gone on from, how it goes on, and wrong ways of going on, if any are known."""

    prompt: str
    continuation: str
    wrong: tuple[str, ...] = ()


def code(
    *, train_size: int, seed: int, allow_code_execution: bool = False, problems: str = "humaneval",
    model: str = "smollm2", data: str | None = None, columns: tuple[str, str] = ("prompt", "completion"),
    train_problems: str | None = None,
    tokens: int = 128, test_tokens: int = 512, problem_count: int | None = None, validation_size: int = 64,
    k: Sequence[int] = (1,), samples: int = 1, temperature: float = 0.0, new_tokens: int = 192, seconds: float = 5.0,
) -> PreparedTask:  # fmt: skip
    """Learning to write functions; tested on problems by running what is written (`limited_process`).

    The loss is of the continuations alone: on the test split of the problems' own solutions. Beside it there is
    `pass@k` for each k, without bias from `samples` samples a problem.

    Args:
        train_size: functions, drawn from what is not held out.
        seed: of the draw, and of sampling.
        allow_code_execution: whether code that the model wrote may be run on this machine: without it the task is
            refused. It is given by whoever runs the experiment, never by its file.
        problems: "humaneval" or a file, see `read_problems`.
        model: "smollm2" (packaged), a hub name, a folder or a `.gguf` file.
        data: file or hub name with functions to learn from; None: those of Python's standard library.
        columns: of `data`, with what is gone on from and how it goes on. A tenth is held out for validation.
        train_problems: in place of `data`, "humaneval" or a file with problems: their solutions are learnt, each paired
            with variants that fail its tests, and batches say in which tokens they differ (`pairs`). A tenth is held
            out for validation; where it is one source with `problems`, half of it is tested on.
        tokens: of a function to learn from; longer ones are left out.
        test_tokens: of a problem with its solution; longer ones are left out of the loss, not of pass@k.
        problem_count: problems that are tested, the same in every run; None: all.
        validation_size: functions that are validated on; there may be fewer.
        k: how many samples one may choose from.
        samples: written for each problem; more than one need a temperature above 0.
        temperature: of sampling; 0: the likeliest token each time.
        new_tokens: that are written at most.
        seconds: that a program may take.

    Raises:
        ConfigError: code may not be run, or the settings of sampling do not fit.
        DataError: a package, a file or the model is missing, or there are fewer functions than `train_size`.
    """
    _check(allow_code_execution, k, samples, temperature, data, train_problems)
    limits, tokenizer = Limits(seconds=seconds), load_tokenizer(decoder(model))
    if train_problems is None:
        tested = read_problems(problems)
        learnt = _functions(data, columns, tested)
    else:
        splits = _problem_splits(train_problems, problems)
        tested, learnt = splits["test"], _paired(splits, limits)
    chosen = some_of(tested, problem_count, name="problems")
    rows = {**learnt, "test": [Learnt(problem.prompt, problem.solution) for problem in chosen]}
    examples = {
        split: _encoded(some, tokenizer, test_tokens if split == "test" else tokens, split=split)
        for split, some in rows.items()
    }
    examples["train"] = drawn(examples["train"], train_size, seed=seed, what=f"functions of at most {tokens} tokens")
    examples["validation"] = some_of(examples["validation"], validation_size, name="validation")
    task = token_task(decoder(model), tokenizer, examples)
    if train_problems is not None:
        task.collate = PairCollator(tokenizer.pad_token_id)
    task.judge = partial(
        pass_rates, tokenizer=tokenizer, problems=chosen, k=tuple(k), samples=samples, temperature=temperature,
        new_tokens=new_tokens, limits=limits, seed=seed, details=task.judged_details,
    )  # fmt: skip
    task.judged_on = [asdict(problem) for problem in chosen]
    return task


def pass_rates(
    model: nn.Module, *, tokenizer: Any, problems: Sequence[Problem], k: Sequence[int], samples: int,
    temperature: float, new_tokens: int, limits: Limits, seed: int, details: dict[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Writes and runs `samples` programs for each problem; `pass@k` for each k. Arguments as in `code`.

    Args:
        details: to which is added how many `samples` there were of each problem, what became of them (`problems`, each
            with its `name`, how many `passed`, and `failures`: kind → how many), and `failures` of all.
    """
    prompts = tokenizer([problem.prompt for problem in problems], verbose=False)["input_ids"]
    written = completions(
        model, tokenizer, prompts, new_tokens=new_tokens, samples=samples, temperature=temperature, seed=seed
    )
    programs = [
        problem.program(text) for problem, texts in zip(problems, written, strict=True) for text in texts
    ]  # fmt: skip
    outcomes = run_all(programs, limits=limits)
    kinds = [
        Counter(outcome.kind for outcome in outcomes[start : start + samples])
        for start in range(0, len(outcomes), samples)
    ]
    passed = [of_problem.pop("passed", 0) for of_problem in kinds]
    if details is not None:
        each = [
            {"name": problem.name, "passed": count, "failures": dict(failures)}
            for problem, count, failures in zip(problems, passed, kinds, strict=True)
        ]
        details |= {"samples": samples, "problems": each, "failures": dict(sum(kinds, Counter[str]()))}
    return {f"pass@{count}": mean_pass_at_k(passed, samples, count) for count in k}


def _check(
    allow_code_execution: bool, k: Sequence[int], samples: int, temperature: float, data: str | None,
    train_problems: str | None,
) -> None:  # fmt: skip
    problems: list[str] = []
    if allow_code_execution is not True:
        problems.append(
            "this task runs code that a model wrote, in a limited process, which is no wall against an attacker; if "
            "that is what you want, give --allow-code-execution to `rgft bench run`, best in a container"
        )
    if samples < 1 or temperature < 0.0 or (samples > 1 and temperature == 0.0):
        problems.append(
            f"samples and temperature: expected one sample, or several with a temperature above 0, found {samples} "
            f"with {temperature:g}"
        )
    if not k or not all(1 <= count <= samples for count in k):
        problems.append(f"k: expected numbers from 1 to samples ({samples}), found {list(k)}")
    if data is not None and train_problems is not None:
        problems.append("data and train_problems: expected one of them, found both")
    if problems:
        raise ConfigError(problems)


def _functions(
    data: str | None, columns: tuple[str, str], tested: Sequence[Problem]
) -> dict[str, list[Learnt]]:  # fmt: skip
    """Functions to learn from and to validate on, without any that is a problem's solution."""
    if data is None:
        found = function_splits()
        splits = {split: [Learnt(f.prompt, f.body) for f in found[split]] for split in ("train", "validation")}
    else:
        rows = [Learnt(str(row[columns[0]]), str(row[columns[1]])) for row in read_rows(data, columns)]
        train, validation = stratified(rows, key=lambda row: row, label=lambda row: 0, held_out=0.1, seed=0)
        splits = {"train": train, "validation": validation}
    kept = {split: _not_solved(some, lambda row: row.continuation, tested) for split, some in splits.items()}
    return apart({"test": [], **kept}, key=lambda row: row)


def _problem_splits(source: str, tested: str) -> dict[str, list[Problem]]:
    """Problems to learn from and to validate on, and those that are tested."""
    problems = read_problems(source)
    halves = len(problems) // 2 if source == tested else 0
    splits = shuffled(problems, name="problems", test=halves, validation=max(1, len(problems) // 10))
    test = splits["test"] if source == tested else read_problems(tested)
    kept = {split: _not_solved(splits[split], lambda p: p.solution, test) for split in ("train", "validation")}
    return apart({"test": test, **kept}, key=lambda problem: _words(problem.prompt))


def _paired(splits: Mapping[str, Sequence[Problem]], limits: Limits) -> dict[str, list[Learnt]]:
    """Solutions to learn from, each with its wrong variants, and to validate on."""
    wrong = wrong_variants(tuple(splits["train"]), limits)
    return {
        "train": [Learnt(problem.prompt, problem.solution, texts) for problem, texts in wrong.items()],
        "validation": [Learnt(problem.prompt, problem.solution) for problem in splits["validation"]],
    }


def _not_solved(rows: Sequence[T], text: Callable[[T], str], tested: Sequence[Problem]) -> list[T]:
    """Rows whose text is, but for white space, no solution of a problem that is tested."""
    solutions = {_words(problem.solution) for problem in tested}
    return [row for row in rows if _words(text(row)) not in solutions]


def _words(text: str) -> str:
    return " ".join(text.split())


def _encoded(rows: Sequence[Learnt], tokenizer: Any, tokens: int, *, split: str) -> list[dict[str, Any]]:
    """Examples with their end, and which of their tokens are error-sensitive; of a prompt nothing is learnt.

    Longer ones are left out.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token, which ends each function; set its eos_token")

    def ids_of(continuation: str) -> list[int]:
        return [*tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"], end]

    examples: list[dict[str, Any]] = []
    for row in rows:
        before, after = tokenizer(row.prompt, verbose=False)["input_ids"], ids_of(row.continuation)
        if len(before) + len(after) <= tokens:
            example = {"input_ids": [*before, *after], "labels": [IGNORED] * len(before) + after}
            if row.wrong:
                marks = error_sensitive_tokens(after, [ids_of(text) for text in row.wrong], tokenizer)
                example[SENSITIVE] = [False] * len(before) + marks
            examples.append(example)
    if len(examples) < len(rows) and split == "test":
        log.warning("test: %d of %d problems are too long for the loss", len(rows) - len(examples), len(rows))
    if not examples:
        raise DataError(f"{split}: expected functions of at most {tokens} tokens, found none of {len(rows)}")
    return examples
