"""Conversations as token ids, and which of them are what the assistant says."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from rgft.errors import DataError
from rgft.tasks.conversations import Conversation
from rgft.tasks.token_loss import IGNORED

#: Beginning and end in a rendered text, in characters.
Span = tuple[int, int]

#: The mark with which a template says itself what the assistant says (Transformers' own pattern).
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode(conversation: Conversation, tokenizer: Any, *, assistant_only: bool, where: str) -> dict[str, list[int]]:
    """Token ids and labels of one conversation.

    The template's own marks (`{% generation %}`) say what the assistant says; without them it is what a rendering up
    to and through a turn has more than a rendering up to it. The text is tokenised once, whole, as it is in use: turns
    tokenised apart come out differently at their borders. A token that is partly the assistant's is learnt.

    Args:
        conversation: what is encoded.
        tokenizer: a fast tokenizer with a chat template.
        assistant_only: whether only what the assistant says is learnt.
        where: source and row, for messages.

    Raises:
        DataError: the template fails, or has no marks and renders earlier turns differently once others follow.
    """
    if not assistant_only:
        text = _rendered(tokenizer, conversation, where)
        spans = [(0, len(text))]
    elif _MARK.search(tokenizer.get_chat_template()):
        text, spans = _with_marks(tokenizer, conversation, where)
    else:
        text = _rendered(tokenizer, conversation, where)
        spans = _by_prefixes(tokenizer, conversation, text, where)
    # The template writes the special tokens; the tokenizer must not add them again.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(begin < stop and end > start for start, stop in spans) else IGNORED
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _with_marks(tokenizer: Any, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # Not `apply_chat_template(…, return_assistant_tokens_mask=True)`: where a marked part ends in white space that
        # the tokenizer drops, its mask runs on to the end of the conversation.
        found: Any = render_jinja_template(
            [conversation], chat_template=tokenizer.get_chat_template(), return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
    except Exception as error:  # Jinja's own, and whatever a template raises
        raise _cannot_render(where, error) from error
    texts, spans = found
    return texts[0], [(start, stop) for start, stop in spans[0]]


def _by_prefixes(tokenizer: Any, conversation: Conversation, text: str, where: str) -> list[Span]:
    """Where in the rendered text the assistant speaks, end-of-turn tokens included, line ends after them not."""
    spans: list[Span] = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _before(tokenizer, conversation[: turn + 1], where)
        through = _rendered(tokenizer, conversation[: turn + 1], where)
        said = str(message.get("content") or "").strip()
        span = _span(text, before, through, said)
        if span is None:
            raise DataError(
                f"{where}: the chat template renders turn {turn + 1} differently once other turns follow, so that what "
                "the assistant says cannot be found in it; give a template with {% generation %} marks around it by "
                "--set chat_template=FILE, or learn everything with --set loss_on=all"
            )
        spans.append(span)
    return spans


def _before(tokenizer: Any, conversation: Conversation, where: str) -> str:
    """The rendering up to where the assistant begins to speak in the last turn."""
    if len(conversation) > 1:
        return _rendered(tokenizer, conversation[:-1], where, add_generation_prompt=True)
    # A template cannot render nothing: what does not depend on what is said comes before it.
    message = conversation[0]
    other = "b" if str(message.get("content") or "").lstrip().startswith("a") else "a"
    one, another = (_rendered(tokenizer, [m], where) for m in (message, {**message, "content": other}))
    return "".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, another, strict=False)))


def _span(text: str, before: str, through: str, said: str) -> Span | None:
    """Where a turn is in the whole text, or None.

    Args:
        text: the whole conversation.
        before, through: what is rendered up to the turn, and with it as the last one.
        said: its content.
    """
    stop = len(through.rstrip())
    if through.startswith(before) and text.startswith(through[:stop]):
        if through[:stop].endswith(said):
            stop = len(through)  # no end-of-turn token: the line end is what ends the turn
        return len(before), stop
    # Some templates write more into the last turn (room for reasoning) than into the same one further up. It is found
    # if it is what comes next in the text, up to the same end.
    _, found, ending = through.rstrip().rpartition(said)
    start = len(before)
    rest = text[start:]
    if text.startswith(before) and said and found and ending and rest.lstrip().startswith(said + ending):
        return start, start + len(rest) - len(rest.lstrip()) + len(said + ending)
    return None


def _rendered(tokenizer: Any, conversation: Conversation, where: str, *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # Jinja's own, and whatever a template raises
        raise _cannot_render(where, error) from error


def _cannot_render(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the chat template cannot render it: {type(error).__name__}: {error}")
