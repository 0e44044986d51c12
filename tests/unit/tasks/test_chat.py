import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rgft.errors import DataError
from rgft.tasks.chat import chat
from rgft.tasks.conversations import Conversation, conversation_of
from rgft.tasks.token_loss import IGNORED
from tests.decoders import FORGETFUL, TEMPLATE, WORDS, save_decoder

TURNS: Conversation = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "yes"},
]


def learnt(example: dict[str, list[int]]) -> list[str]:
    return [WORDS[label] for label in example["labels"] if label != IGNORED]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("model"))


def rows(path: Path, conversations: list[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    return str(path)


def test_conversations_become_a_task(model: str, tmp_path: Path) -> None:
    conversations = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a in "abcdef" for b in ("yes", "no")
    ]
    task = chat(model=model, train=rows(tmp_path / "chat.jsonl", conversations), held_out=0.25)
    assert task.validation is not None
    assert len(task.train) + len(task.validation) == 12
    batch = task.collate([task.train[0], task.train[1]])
    assert task.weight(batch) == 4
    assert task.loss(task.model, batch).shape == (2,)


@pytest.mark.parametrize("name", ["pairs.csv", "shares.jsonl", "text.csv"])
def test_other_forms_of_the_same_conversation(model: str, tmp_path: Path, name: str) -> None:
    import csv

    path = tmp_path / name
    columns: tuple[str, ...] = ("messages",)
    if name == "pairs.csv":
        columns = ("question", "reply")
        path.write_text("question,reply\na b,yes\n")
    elif name == "shares.jsonl":
        rows(path, [[{"from": "human", "value": "a b"}, {"from": "gpt", "value": "yes"}]])
    else:
        turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "yes"}]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    task = chat(model=model, train=str(path), validation=str(path), messages=columns)
    assert learnt(task.train[0]) == ["yes", "<|end|>"]
    assert [WORDS[i] for i in task.train[0]["input_ids"]][1:4] == ["<|user|>", "a", "b"]


def test_what_is_too_long_is_cut_and_what_has_nothing_left_is_left_out(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    long = [{"role": "user", "content": "a b c d e f g h"}, {"role": "assistant", "content": "no"}]
    half = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a b c d e f"}]
    path = rows(tmp_path / "chat.jsonl", [short, long, half])
    with caplog.at_level(logging.WARNING, logger="rgft"):
        task = chat(model=model, train=path, validation=path, max_length=8)
    assert "train: 2 of 3 conversations are longer than 8 tokens and are cut" in caplog.text
    assert "train: 1 of 3 conversations have nothing to learn" in caplog.text
    assert [learnt(task.train[i]) for i in range(len(task.train))] == [["yes", "<|end|>"], ["a", "b", "c"]]
    with pytest.raises(DataError, match="found none of 1; raise max_length"):
        chat(model=model, train=rows(tmp_path / "long.jsonl", [long]), validation=path, max_length=8)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"from": ["gpt"], "value": "a"}], "message 1: expected a role of system"),
        ([], "expected a list of messages"),
        ("hello", "found the text 'hello'"),
        (3, "expected a list of messages, found 3"),
        ([{"role": "user", "content": "a"}], "at least one message of the assistant"),
        ([{"role": "wizard", "content": "a"}], "message 1: expected a role of system"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "message 2: expected a text"),
        ([{"role": "user"}], "message 1: expected role and content"),
        ([{"role": "assistant", "content": None}], "message 1: expected a text as content, found None"),
    ],
)
def test_what_is_no_conversation(messages: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        conversation_of(messages)


def test_whatever_else_a_message_has_goes_to_the_template() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    messages = [
        {"role": "user", "content": "a", "name": "b", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    assert conversation_of(messages) == [
        {"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "tool_calls": calls}
    ]  # fmt: skip


def test_bad_rows_are_named_all_at_once(model: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.jsonl", [[{"role": "user", "content": "a"}], TURNS, []])
    with pytest.raises(DataError) as caught:
        chat(model=model, train=path)
    assert "row 1: expected at least one message" in str(caught.value)
    assert "row 3: expected a list of messages" in str(caught.value)


def test_a_third_column_is_refused(model: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.jsonl", [TURNS])
    with pytest.raises(DataError, match=r"expected one column of conversations, or two .* found 3: a, b, c"):
        chat(model=model, train=path, messages=("a", "b", "c"))


def test_a_template_that_fails_names_the_row_of_the_file(model: str, tmp_path: Path) -> None:
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    path = rows(tmp_path / "chat.jsonl", [[*short[:1], {**short[1], "content": c}] for c in "abcdefg"] + [TURNS])
    template = tmp_path / "forgetful.jinja"
    template.write_text(FORGETFUL)
    for seed in range(3):  # whichever side of the split it comes to
        with pytest.raises(DataError, match=r"chat\.jsonl, row 8: the chat template renders turn 3 differently"):
            chat(model=model, train=path, chat_template=str(template), seed=seed, held_out=0.4)


def test_templates_that_are_missing_or_broken(model: str, tmp_path: Path) -> None:
    path = rows(tmp_path / "chat.jsonl", [TURNS, [*TURNS[:3]]])
    base = save_decoder(tmp_path / "base", template=None)
    with pytest.raises(DataError, match=r"no chat template .*--set chat_template=FILE"):
        chat(model=base, train=path, validation=path)
    with pytest.raises(DataError, match="expected a Jinja template; it cannot be read"):
        chat(model=base, train=path, validation=path, chat_template=str(tmp_path / "none.jinja"))
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}{{ raise_exception('no system') }}{% endfor %}")
    with pytest.raises(DataError, match=r"row 1: the chat template cannot render it: .*no system"):
        chat(model=base, train=path, validation=path, chat_template=str(broken))
    good = tmp_path / "good.jinja"
    good.write_text(TEMPLATE)
    task = chat(model=base, train=path, validation=path, chat_template=str(good))
    assert task.processor.chat_template == TEMPLATE
