"""Reading conversations: a column of messages, or a prompt and an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rgft.errors import DataError
from rgft.tasks.files import read_rows

#: Messages with `role`, `content` and whatever else a chat template may use (a name, reasoning, …).
Conversation = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")

#: Roles in the older form, {"from": …, "value": …} (ShareGPT).
_OLDER = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def read_conversations(source: str, columns: Sequence[str], *, split: str = "train") -> list[Conversation]:
    """The conversations of a file or hub data set.

    Args:
        source: a file or hub name, see `read_rows`.
        columns: one column of conversations: lists of {"role", "content"} (or of {"from", "value"}; in CSV and TSV as
            JSON); or two columns with a prompt and its answer.
        split: of a hub data set.

    Raises:
        DataError: the source cannot be read, or rows are no conversations: the first ten of them are named.
    """
    if not 1 <= len(columns) <= 2:
        raise DataError(
            f"messages: expected one column of conversations, or two with prompt and answer, found {len(columns)}: "
            f"{', '.join(columns) or 'none'}"
        )
    conversations: list[Conversation] = []
    problems: list[str] = []
    for number, row in enumerate(read_rows(source, columns, split=split), start=1):
        if len(columns) == 2:
            messages: Any = [
                {"role": role, "content": row[column]}
                for role, column in zip(("user", "assistant"), columns, strict=True)
            ]
        else:
            messages = row[columns[0]]
        try:
            conversations.append(conversation_of(messages))
        except DataError as problem:
            problems.append(f"{source}, row {number}: {problem}")
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more)
    return conversations


def conversation_of(messages: Any) -> Conversation:
    """Messages in the form of chat templates.

    Raises:
        DataError: it is no conversation, or the assistant says nothing in it.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError:
            raise DataError(f"expected a list of messages, found the text {messages[:40]!r}") from None
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(f"expected a list of messages, found {messages!r}")
    conversation = [_message(position, message) for position, message in enumerate(messages, start=1)]
    if all(message["role"] != "assistant" for message in conversation):
        raise DataError("expected at least one message of the assistant, found none: there is nothing to learn")
    return conversation


def _message(position: int, message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
        role = message["from"]
        message = {"role": _OLDER.get(role, role) if isinstance(role, str) else role, "content": message["value"]}
    calls_tools = isinstance(message, Mapping) and bool(message.get("tool_calls"))
    if not isinstance(message, Mapping) or "role" not in message or not (calls_tools or "content" in message):
        raise DataError(f"message {position}: expected role and content, found {message!r}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise DataError(f"message {position}: expected a role of {', '.join(ROLES)}, found {role!r}")
    if not (isinstance(content, str) and content.strip()) and not (calls_tools and not content):
        raise DataError(f"message {position}: expected a text as content, found {content!r}")
    # Columns of parquet files and the hub have every key that occurs anywhere, as null where it does not.
    return {key: value for key, value in message.items() if value is not None}
