"""Parameter groups taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn


def taken_apart(
    groups: Iterable[Mapping[str, Any]], is_apart: Callable[[nn.Parameter], bool]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each group as up to two, in the order of what they hold first: what is to stand apart, and what is not."""
    for group in groups:
        parts: dict[bool, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(is_apart(parameter), []).append(parameter)
        yield from (({**group, "params": parameters}, apart) for apart, parameters in parts.items())
