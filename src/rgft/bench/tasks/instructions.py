"""Instruction tuning: the loss is of the answer alone, and the test split is also answered and compared exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from rgft.bench.tasks import news
from rgft.bench.tasks.generation import completions
from rgft.bench.tasks.packaged import decoder
from rgft.bench.tasks.splits import apart, drawn, packaged_or_own, shuffled, some_of
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.chat import encoded
from rgft.tasks.conversations import Conversation, read_conversations
from rgft.tasks.models import load_tokenizer
from rgft.tasks.token_task import token_task

#: What the packaged sets say to the model first: shorter than what a template says by itself.
SYSTEM = "Answer briefly."

#: Words of an article that are asked about.
WORDS = 24


def instructions(
    *, train_size: int, seed: int, data: str = "arithmetic", model: str = "smollm2", max_length: int = 96,
    validation: str | None = None, test: str | None = None, messages: Sequence[str] = ("messages",),
    test_size: int = 128, validation_size: int = 64, new_tokens: int | None = None,
) -> PreparedTask:  # fmt: skip
    """Answers to instructions under the model's chat template.

    Beside loss, perplexity and token accuracy of the answers there is `exact_match`: the share of test instructions
    whose answer, written greedily, is the reference once white space at both ends is taken off.

    Args:
        train_size: conversations, drawn from what is not held out.
        seed: of the draw; validation and test are the same for all.
        data: "arithmetic" (sums and differences of numbers of two digits), "topics" (which of five topics the first
            words of a BBC article are about), or a file or hub name of the user's.
        model: "smollm2" (packaged), a hub name, a folder or a `.gguf` file; with a chat template.
        max_length: tokens of a conversation; longer ones are cut.
        validation, test: files or hub names, with data of the user's; both are then needed.
        messages: one column of conversations or two with prompt and answer, in data of the user's (see
            `read_conversations`); each conversation ends with the answer that is compared.
        test_size, validation_size: conversations that are evaluated; there may be fewer.
        new_tokens: that an answer may have; None: four more than the longest reference.

    Raises:
        DataError: a package, a file or the model is missing, a conversation ends with another role than the assistant,
            or there are fewer conversations than `train_size`.
    """
    found = packaged_or_own(
        "data", data, validation, test, packaged={"arithmetic": arithmetic, "topics": topics},
        read=lambda source, split: read_conversations(source, messages, split=split),
    )  # fmt: skip
    splits = apart(found, key=repr)
    rows = {
        "train": drawn(splits["train"], train_size, seed=seed, what="conversations"),
        "validation": some_of(splits["validation"], validation_size, name="validation"),
        "test": some_of(splits["test"], test_size, name="test"),
    }
    for number, conversation in enumerate(rows["test"], start=1):
        if conversation[-1]["role"] != "assistant":
            raise DataError(f"test, row {number}: expected the assistant to speak last, found {conversation[-1]!r}")
    tokenizer = load_tokenizer(decoder(model))
    if not tokenizer.chat_template:
        raise DataError(f"{model}: expected a model with a chat template, found none; give an instruction-tuned one")
    examples = {
        split: encoded(
            [(f"{split}, row {number}", conversation) for number, conversation in enumerate(some, start=1)],
            tokenizer, max_length, assistant_only=True, split=split,
        )
        for split, some in rows.items()
    }  # fmt: skip
    task = token_task(decoder(model), tokenizer, examples)
    task.judge = partial(exact_match, tokenizer=tokenizer, conversations=rows["test"], new_tokens=new_tokens)
    task.judged_on = rows["test"]
    return task


def exact_match(
    model: nn.Module, *, tokenizer: Any, conversations: Sequence[Conversation], new_tokens: int | None = None
) -> dict[str, float]:
    """The share of conversations whose last answer the model writes exactly, `exact_match`."""
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for conversation in conversations
    ]
    references = [str(conversation[-1]["content"]).strip() for conversation in conversations]
    if new_tokens is None:
        new_tokens = max(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"]) + 4
    written = completions(model, tokenizer, prompts, new_tokens=new_tokens)
    right = sum(texts[0].strip() == reference for texts, reference in zip(written, references, strict=True))
    return {"exact_match": right / len(references)}


def arithmetic() -> dict[str, list[Conversation]]:
    """Sums and differences of numbers from 10 to 99; a sum stands once, whatever the order of its terms."""
    rows: list[tuple[str, int]] = []
    for first in range(10, 100):
        for second in range(10, first + 1):
            terms = (first, second) if random.Random(f"{first} {second}").random() < 0.5 else (second, first)
            rows += [(f"{terms[0]} + {terms[1]}", first + second), (f"{first} - {second}", first - second)]
    return _asked(rows, name="arithmetic", question="What is {}?")


def topics() -> dict[str, list[Conversation]]:
    """Beginnings of BBC's articles with their topic in one word, split as the task `bbc` is."""
    splits, names = news.bbc_splits()
    listed = ", ".join(names)
    return {
        split: [_turns(f"{' '.join(text.split()[:WORDS])}\n\nTopic ({listed})?", names[label]) for text, label in some]
        for split, some in splits.items()
    }


def _asked(rows: Sequence[tuple[str, int]], *, name: str, question: str) -> dict[str, list[Conversation]]:
    splits = shuffled(rows, name=name, test=1000, validation=500)
    return {
        split: [_turns(question.format(text), str(answer)) for text, answer in some] for split, some in splits.items()
    }


def _turns(question: str, answer: str) -> Conversation:
    return [
        {"role": "system", "content": SYSTEM}, {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]  # fmt: skip
