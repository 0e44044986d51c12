"""Chat and instruction tuning: conversations under a chat template, learning what the assistant says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.conversations import Conversation, read_conversations
from rgft.tasks.models import load_causal_lm, load_tokenizer, require_positions
from rgft.tasks.split import stratified
from rgft.tasks.token_loss import IGNORED, TokenCollator, TokenMetric, number_of_targets, token_losses

log = logging.getLogger("rgft")

Example = dict[str, list[int]]


def chat(
    *, model: str, train: str, messages: Sequence[str] = ("messages",), validation: str | None = None,
    test: str | None = None, chat_template: str | None = None, assistant_only: bool = True, max_length: int = 1024,
    held_out: float = 0.1, seed: int = 0,
) -> PreparedTask:  # fmt: skip
    """Prepares learning from conversations.

    Args:
        model: hub name or folder of a decoder, or a `.gguf` file.
        train, validation, test: files or hub names. Without `validation`, `held_out` of the training conversations is
            held out, equal ones staying on one side.
        messages: the column with conversations, or two with prompt and answer (see `read_conversations`).
        chat_template: file with a Jinja template; None: the tokenizer's own. It is saved with the model.
        assistant_only: what the assistant says, its end-of-turn token included, is learnt; else everything is.
        max_length: tokens; longer conversations are cut, their number is logged; those with nothing left to learn are
            left out.
        held_out: share of the training conversations for validation where no file is given.
        seed: of the split.

    Raises:
        DataError: a file, column, conversation, template or model cannot be used.
    """
    conversations = {"train": read_conversations(train, messages)}
    for split, source in (("validation", validation), ("test", test)):
        if source is not None:
            conversations[split] = read_conversations(source, messages, split=split)
    if "validation" not in conversations:
        conversations["train"], conversations["validation"] = stratified(
            conversations["train"], key=repr, label=lambda c: 0, held_out=held_out, seed=seed
        )
    tokenizer = load_tokenizer(model)
    _set_template(tokenizer, chat_template)
    data = {
        split: _encoded(some, tokenizer, max_length, assistant_only=assistant_only, where=split)
        for split, some in conversations.items()
    }
    network = load_causal_lm(model, pad_token_id=tokenizer.pad_token_id)
    require_positions(network, (example["input_ids"] for split in data.values() for example in split))
    return PreparedTask(
        model=network, processor=tokenizer, train=data["train"], validation=data["validation"], test=data.get("test"),
        collate=TokenCollator(tokenizer.pad_token_id), loss=token_losses, metric=TokenMetric, weight=number_of_targets,
        primary_metric="perplexity",
    )  # fmt: skip


def _set_template(tokenizer: Any, file: str | None) -> None:
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template: {file}: expected a Jinja template; it cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template (base models have none); give the file of one with "
            "--set chat_template=FILE, or tune an instruction model"
        )
    if not tokenizer.is_fast:
        raise DataError(
            "expected a fast tokenizer, which tells where each token stands in the text, found a slow one; save the "
            "model with tokenizer.json"
        )


def _encoded(
    conversations: list[Conversation], tokenizer: Any, max_length: int, *, assistant_only: bool, where: str
) -> list[Example]:
    examples: list[Example] = []
    cut = empty = 0
    for number, conversation in enumerate(conversations, start=1):
        example = encode(conversation, tokenizer, assistant_only=assistant_only, where=f"{where}, row {number}")
        cut += len(example["input_ids"]) > max_length
        example = {key: values[:max_length] for key, values in example.items()}
        if any(label != IGNORED for label in example["labels"][1:]):
            examples.append(example)
        else:
            empty += 1
    if cut:
        log.warning(
            "%s: %d of %d conversations are longer than %d tokens and are cut", where, cut, len(conversations),
            max_length,
        )  # fmt: skip
    if empty:
        log.warning("%s: %d conversations have nothing to learn in that length and are left out", where, empty)
    if not examples:
        raise DataError(
            f"{where}: expected conversations with something to learn within {max_length} tokens, found none of "
            f"{len(conversations)}; raise max_length"
        )
    return examples


def encode(conversation: Conversation, tokenizer: Any, *, assistant_only: bool, where: str) -> Example:
    """Token ids and labels of one conversation.

    The template's own marks (`{% generation %}`) say what the assistant says; without them it is what a rendering up
    to and through a turn has more than a rendering up to it. The text is tokenised once, whole: where turns are
    tokenised apart, tokens at their borders come out differently than in use.

    Raises:
        DataError: the template fails, or has no marks and renders earlier turns differently once others follow.
    """
    if assistant_only and "generation %}" in tokenizer.chat_template:
        marked = _with_template(
            tokenizer, conversation, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, is_learnt = marked["input_ids"], marked["assistant_masks"]
        return {"input_ids": ids, "labels": [i if on else IGNORED for i, on in zip(ids, is_learnt, strict=True)]}
    text = _with_template(tokenizer, conversation, where, tokenize=False)
    # The template writes the special tokens; the tokenizer must not add them again.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    spans = _assistant_spans(tokenizer, conversation, text, where) if assistant_only else [(0, len(text))]
    labels = [
        token if any(begin < stop and end > start for start, stop in spans) else IGNORED
        for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _assistant_spans(
    tokenizer: Any, conversation: Conversation, text: str, where: str
) -> list[tuple[int, int]]:  # fmt: skip
    """Where in the rendered text the assistant speaks, end-of-turn tokens included, line ends after them not."""
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before = _with_template(
            tokenizer, conversation[:turn], where, tokenize=False, add_generation_prompt=True
        )  # fmt: skip
        through = _with_template(tokenizer, conversation[: turn + 1], where, tokenize=False)
        if not (through.startswith(before) and text.startswith(through.rstrip())):
            raise DataError(
                f"{where}: the chat template renders turn {turn + 1} differently once other turns follow, so that what "
                "the assistant says cannot be found in it; give a template with {% generation %} marks around it by "
                "--set chat_template=FILE, or learn everything with --set loss_on=all"
            )
        stop = len(through.rstrip())
        if through[len(before) : stop].strip() == message["content"].strip():
            stop = len(through)  # no end-of-turn token: the line end is what ends the turn
        spans.append((len(before), stop))
    return spans


def _with_template(tokenizer: Any, conversation: Conversation, where: str, **settings: Any) -> Any:
    if not conversation:  # some templates fail without a first turn
        return ""
    try:
        return tokenizer.apply_chat_template(conversation, **settings)
    except Exception as error:  # Jinja's own, and whatever a template raises
        raise DataError(f"{where}: the chat template cannot render it: {type(error).__name__}: {error}") from error
