"""Pairs of a right and a wrong program: found by running tests, marked where they differ, and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.bench.methods import METHODS
from rgft.bench.tasks import bench_task, pairs
from rgft.bench.tasks.limited_process import Limits, Outcome
from rgft.bench.tasks.pairs import SENSITIVE, error_sensitive, error_sensitive_tokens, wrong_variants
from rgft.bench.tasks.problems import Problem
from rgft.errors import ConfigError
from rgft.run import Run, Settings
from rgft.tasks.token_loss import IGNORED
from tests.decoders import save_decoder
from tests.unit.bench.tasks.test_problems import written

LIMITS = Limits(seconds=3.0)


def problem(number: int, solution: str = "", test: str = "") -> dict[str, str]:
    return {
        "task_id": f"H/{number}", "prompt": f"def f{number}(x):\n", "entry_point": f"f{number}",
        "canonical_solution": solution or f"    a = x * {number}\n    return a\n",
        "test": test or f"def check(candidate):\n    assert candidate(2) == {2 * number}\n",
    }  # fmt: skip


def test_tokens_that_differ_in_lines_that_differ_are_sensitive() -> None:
    correct = [[1, 2], [3, 4, 5], [6], [3, 4, 9]]
    assert error_sensitive(correct, correct) == [False] * 9
    wrong = [[1, 2], [3, 7, 5], [6], [3, 4, 9]]
    assert error_sensitive(correct, wrong) == [False, False, False, True, False, False, False, False, False]
    lacking = [[1, 2], [6], [3, 4, 9]]
    assert error_sensitive(correct, lacking) == [False, False, True, True, True, False, False, False, False]
    assert error_sensitive(correct, [*correct, [8]]) == [False] * 9


def test_lines_are_told_apart_by_their_tokens() -> None:
    tokenizer: Any = type("Letters", (), {"decode": lambda self, ids: "".join(map(chr, ids))})()
    right, *wrong = (list(map(ord, text)) for text in ("a\nb+c\na", "a\nb-c\na", "a\nb+c\nd"))
    assert error_sensitive_tokens(right, wrong, tokenizer) == [place in (3, 6) for place in range(7)]


def test_a_wrong_variant_fails_its_tests_and_never_for_want_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(number: int, **changes: str) -> Problem:
        row = problem(number, **changes)
        test = f"{row['test']}\ncheck(f{number})\n"
        return Problem(name=f"{number}", prompt=row["prompt"], solution=row["canonical_solution"], test=test, stops=())

    right = made(3)
    fails_itself = made(4, test="def check(candidate):\n    assert False\n")
    tests_nothing = made(5, test="def check(candidate):\n    pass\n")
    found = wrong_variants((right, fails_itself, tests_nothing), LIMITS)
    assert set(found) == {right}
    assert len(set(found[right])) > 1
    for text in found[right]:
        with pytest.raises((AssertionError, NameError)):
            exec(right.prompt + text + right.test, {})
    right_alone = {right.prompt + right.solution: Outcome(passed=True, reason="passed")}
    slow = Outcome(passed=False, reason="out of time")
    monkeypatch.setattr(pairs, "run_all", lambda some, limits: [right_alone.get(one.code, slow) for one in some])
    wrong_variants.cache_clear()
    assert wrong_variants((right,), LIMITS) == {}
    wrong_variants.cache_clear()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


def settings(folder: Path, decoder: str, **more: Any) -> dict[str, Any]:
    """Solutions of words that the tokenizer knows: `a` and `b` are names, and to change one makes a program wrong."""
    rows = [
        problem(
            number, f"    a = x\n    b = {number}\n    return a\n",
            f"def check(candidate):\n    assert candidate({number + 1}) == {number + 1}\n",
        )
        for number in range(20)
    ]  # fmt: skip
    source = written(folder / "p.jsonl", *rows)
    return {
        "name": "code", "train_size": 6, "model": decoder, "problems": source, "train_problems": source, **more,
    }  # fmt: skip


def test_one_source_is_split_and_what_is_learnt_is_marked(tmp_path: Path, decoder: str) -> None:
    task = bench_task(settings(tmp_path, decoder), seed=0, allow_code_execution=True)
    assert task.judge is not None
    tested = {one.prompt for one in task.judge.keywords["problems"]}  # type: ignore[attr-defined]
    assert len(tested) == 10
    marked = [example for example in (task.train[i] for i in range(6)) if any(example[SENSITIVE])]
    assert len(marked) == 6
    for example in marked:
        assert len(example[SENSITIVE]) == len(example["input_ids"])
        assert not any(m for m, label in zip(example[SENSITIVE], example["labels"], strict=True) if label == IGNORED)
    batch = task.collate([marked[0], {key: value[:3] for key, value in marked[1].items()}, task.validation[0]])  # type: ignore[index]
    assert batch[SENSITIVE].shape == batch["input_ids"].shape
    assert batch[SENSITIVE].sum(1).tolist()[2] == 0
    assert not batch[SENSITIVE][1, 3:].any()
    with pytest.raises(ConfigError, match="data and train_problems: expected one of them"):
        bench_task(settings(tmp_path, decoder, data="x.jsonl"), seed=0, allow_code_execution=True)


@pytest.mark.parametrize("name", ["fait", "full", "rgft", "lora", "lora_top"])
def test_methods_train_on_pairs(tmp_path: Path, decoder: str, name: str) -> None:
    task, method = bench_task(settings(tmp_path, decoder), seed=0, allow_code_execution=True), METHODS[name]
    task.model, task.loss = method.prepare(task.model, {}), method.loss_of(task.loss, {})
    config = method.configuration(budget=0.9, seed=0, settings={})
    run = Run(task, config, Settings(lr=1e-2, epochs=2.0, batch_size=3), full_flops=1e12)
    try:
        run.train()
        assert run.guide.step_count > 0
        assert task.validation is not None
        assert torch.tensor(run.evaluate(task.validation)["loss"]).isfinite()
    finally:
        run.close()


def test_marks_change_what_is_learnt(tmp_path: Path, decoder: str) -> None:
    task = bench_task(settings(tmp_path, decoder), seed=0, allow_code_execution=True)
    batch = task.collate([task.train[0], task.train[1]])
    loss = METHODS["fait"].loss_of(task.loss, {})
    model = task.model.train()
    assert not torch.equal(loss(model, batch), task.loss(model, batch))
    none = {**batch, SENSITIVE: torch.zeros_like(batch[SENSITIVE])}
    torch.testing.assert_close(loss(model, none), task.loss(model, batch))
