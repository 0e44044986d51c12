import logging
from pathlib import Path

import pytest

from rgft.errors import DataError
from rgft.tasks.language_modelling import language_modelling, packed
from tests.decoders import save_decoder

TEXTS = [" ".join("abcdefghij"[(i + j) % 10] for j in range(4 + i % 3)) for i in range(30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return str(path)


def test_packing_by_hand() -> None:
    assert packed([[1, 2, 3], [4], [5, 6, 7, 8]], 3) == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_packed_blocks_hold_every_token_once(model: str, texts: str) -> None:
    task = language_modelling(model=model, train=texts, max_length=16)
    assert task.validation is not None
    joined = [[t for example in split for t in example["input_ids"]] for split in (task.train, task.validation)]  # type: ignore[union-attr]
    words = [task.processor.decode(ids, skip_special_tokens=True).split() for ids in joined]
    assert sorted(words[0] + words[1]) == sorted(" ".join(TEXTS).split())
    assert [len(task.train[i]["input_ids"]) for i in range(len(task.train) - 1)] == [16] * (len(task.train) - 1)
    assert sum(ids.count(3) for ids in joined) == len(TEXTS)  # each text is ended
    assert all(example["labels"] == example["input_ids"] for example in task.train)  # type: ignore[union-attr]


def test_equal_texts_stay_on_one_side(model: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS * 2))
    task = language_modelling(model=model, train=str(path), packing=False, held_out=0.3)
    train = {tuple(task.train[i]["input_ids"]) for i in range(len(task.train))}
    assert task.validation is not None
    held = {tuple(task.validation[i]["input_ids"]) for i in range(len(task.validation))}
    assert train
    assert held
    assert not train & held


def test_without_packing_long_texts_are_cut_and_counted(
    model: str, texts: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="rgft"):
        task = language_modelling(model=model, train=texts, validation=texts, packing=False, max_length=6)
    # <s>, 4 to 6 words, </s>: those of 5 and 6 words are too long.
    assert "train: 20 of 30 texts are longer than 6 tokens and are cut" in caplog.text
    assert max(len(example["input_ids"]) for example in task.train) == 6  # type: ignore[union-attr]
    assert len(task.train) == 30


def test_a_last_block_of_one_token_is_left_out_and_counted(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a b c d e")  # <s>, 5 words, </s>
    with caplog.at_level(logging.WARNING, logger="rgft"):
        task = language_modelling(model=model, train=str(path), validation=str(path), max_length=3)
    assert "train: 1 of 3 examples are single tokens" in caplog.text
    assert [len(task.train[i]["input_ids"]) for i in range(len(task.train))] == [3, 3]


def test_bad_input(model: str, texts: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model has 64 positions, found an example of 65 tokens"):
        language_modelling(model=model, train=texts, max_length=65)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "a b"}\n{"text": " "}\n')
    with pytest.raises(DataError, match="row 2: expected a text in column 'text', found ' '"):
        language_modelling(model=model, train=str(empty))
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n\n")
    with pytest.raises(DataError, match="expected at least one row"):
        language_modelling(model=model, train=str(blank))
