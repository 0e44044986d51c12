from typing import Any

import pytest

from rgft.errors import DataError
from rgft.tasks.chat_encoding import encode
from rgft.tasks.conversations import Conversation
from rgft.tasks.token_loss import IGNORED
from tests.decoders import FORGETFUL, MARKED, TEMPLATE, WORDS, word_tokenizer

TURNS: Conversation = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "yes"},
]

#: As ChatML with a default system prompt, written where a conversation begins with another role.
WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: The last turn gets room for reasoning, the same turn further up does not.
THINKING = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' and loop.last %}no no {% endif %}"
    "{{ m['content'] }} <|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def learnt(example: dict[str, list[int]]) -> list[str]:
    return [WORDS[label] for label in example["labels"] if label != IGNORED]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistants_turns_are_learnt_ends_of_turns_included(template: str) -> None:
    example = encode(TURNS, word_tokenizer(template), assistant_only=True, where="here")
    first = "<s> <|system|> a <|end|> <|user|> b c <|end|> <|assistant|> d e <|end|>"  # one <s>, the template's
    second = "<|user|> f <|end|> <|assistant|> yes <|end|>"
    assert [WORDS[i] for i in example["input_ids"]] == [*first.split(), *second.split()]
    assert learnt(example) == ["d", "e", "<|end|>", "yes", "<|end|>"]
    places = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
    assert places == [9, 10, 11, 16, 17]


def test_everything_is_learnt_on_request() -> None:
    example = encode(TURNS, word_tokenizer(), assistant_only=False, where="here")
    assert example["labels"] == example["input_ids"]


def test_a_template_that_changes_earlier_turns_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"row 3: the chat template renders turn 3 differently .*generation"):
        encode(TURNS, word_tokenizer(FORGETFUL), assistant_only=True, where="train, row 3")
    example = encode(TURNS, word_tokenizer(FORGETFUL), assistant_only=False, where="here")
    assert "d" not in learnt(example)


@pytest.mark.parametrize("opening", ["{% generation %}", "{%- generation -%}", "{%-generation%}"])
def test_marks_are_seen_however_they_are_written(opening: str) -> None:
    # Without them, this template would be refused: it leaves out what earlier turns said.
    template = (
        "<s>{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}" + opening +
        "{% if loop.last %}{{ m['content'] }} {% endif %}<|end|>{% endgeneration %}{% else %}{{ m['content'] }} <|end|>"
        "{% endif %}\n{% endfor %}"
    )  # fmt: skip
    assert learnt(encode(TURNS, word_tokenizer(template), assistant_only=True, where="here")) == [
        "<|end|>", "yes", "<|end|>"
    ]  # fmt: skip


def test_a_mark_around_white_space_ends_where_it_ends() -> None:
    template = MARKED.replace("<|end|>{% endgeneration %}", "<|end|>\n{% endgeneration %}")
    tokenizer = word_tokenizer(template)
    example = encode(TURNS, tokenizer, assistant_only=True, where="here")
    assert learnt(example) == ["d", "e", "<|end|>", "yes", "<|end|>"]
    assert example["input_ids"] == tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]


def test_a_last_turn_with_more_in_it_is_found_further_up() -> None:
    example = encode(TURNS, word_tokenizer(THINKING), assistant_only=True, where="here")
    assert learnt(example) == ["d", "e", "<|end|>", "no", "no", "yes", "<|end|>"]
    places = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
    assert places[:3] == [9, 10, 11]


def test_content_that_is_repeated_is_learnt_where_the_assistant_says_it() -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    example = encode(turns, word_tokenizer(THINKING), assistant_only=True, where="here")
    words = " ".join(WORDS[i] for i in example["input_ids"])
    assert words == "<s> <|user|> a <|end|> <|assistant|> a <|end|> <|user|> a <|end|> <|assistant|> no no a <|end|>"
    assert [place for place, label in enumerate(example["labels"]) if label != IGNORED] == [5, 6, 11, 12, 13, 14]


def byte_tokenizer(template: str, *, trim_offsets: bool) -> Any:
    """Byte-level BPE as GPT-2's; trimmed offsets leave out the space that a token begins with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat says hello to the other cat\n\nhello there"] * 9, trainer)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("first", ["user", "assistant"])
def test_bytes_spaces_and_a_turn_that_comes_first(trim_offsets: bool, first: str) -> None:
    said = ["the cat says: 你好 😀  hello ", "hello  there"]
    turns = [
        {"role": "user", "content": "hello hello"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": said[1]},
        {"role": "assistant", "content": said[1]},
    ]
    turns = turns[first == "assistant" :]
    tokenizer = byte_tokenizer(WITH_DEFAULT, trim_offsets=trim_offsets)
    example = encode(turns, tokenizer, assistant_only=True, where="here")
    assert example["input_ids"] == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    runs: list[list[int]] = [[]]
    for label in example["labels"]:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    assert [tokenizer.decode(run) for run in runs if run] == [f"{text}<|im_end|>" for text in said]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_line_end_that_ends_the_turn_is_learnt(trim_offsets: bool) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = byte_tokenizer(template, trim_offsets=trim_offsets)
    example = encode(TURNS[1:3], tokenizer, assistant_only=True, where="here")
    # It has no generation prompt either: in use, the model must say itself whose turn it is.
    assert tokenizer.decode([label for label in example["labels"] if label != IGNORED]) == "assistant: d e\n"
