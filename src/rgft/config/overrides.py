"""Overrides from the command line: `key.path=value`, with typed values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rgft.config.presets import STAGES
from rgft.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

#: A list whose texts stand without quotes, which shells take away.
_PLAIN_LIST = re.compile(r"\[([^][{}\"']+)\]")


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` in which each `key.path=value` is set; later ones win.

    Values are read as JSON (`3`, `1e-3`, `true`, `null`, `["a"]`, `{"x": 1}`), numbers also as `.5`, `5.` or `+5`,
    texts in a list also without quotes (`[a,b]`); everything else is text. Below a stage that is a name alone
    (`mask: energy`), `mask.rho=.9` sets its settings; a stage named anew (`mask=energy`) loses those that it had.

    Raises:
        ConfigError: overrides without a key or `=`, or below something that is no group; all of them at once.
    """
    result = _copied(data)
    problems: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"{override!r}: expected key=value, e.g. probe.size=32")
            continue
        node: dict[str, Any] = result
        for index, key in enumerate(keys[:-1]):
            below: Any = node.get(key)
            if below is None or (key == "budget" and below == "none"):
                below = {}
            elif index == 0 and key in STAGES and isinstance(below, str):
                below = {"name": below}
            elif index == 0 and key == "budget" and isinstance(below, (int, float)):
                below = {"flops": below} if keys[1:] == ["memory"] else {}  # a limit beside what is spent
            if not isinstance(below, dict):
                problems.append(
                    f"{path}: expected a group of settings at {'.'.join(keys[: index + 1])!r}, found {below!r}"
                )
                break
            node[key] = below
            node = below
        else:
            node[keys[-1]] = parsed(text.strip())
    if problems:
        raise ConfigError(problems)
    return result


def parsed(text: str) -> Any:
    """The value that `text` stands for."""
    if _NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    try:
        # NaN and Infinity are no JSON: left as text, to be refused where a number is expected.
        return json.loads(text, parse_constant=lambda constant: constant)
    except json.JSONDecodeError:
        found = _PLAIN_LIST.fullmatch(text)
        items = [item.strip() for item in found[1].split(",")] if found else [""]
        return [parsed(item) for item in items] if all(items) else text


def _copied(value: Any) -> Any:
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, Mapping) else value
