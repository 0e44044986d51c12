"""Runs of neighbouring active slices: what a weight gradient is made for in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rgft.execution.split_weight import Range


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring active slices: `members` are their ranges, in order."""

    start: int
    stop: int
    members: tuple[Range, ...]


def runs_of(active: Sequence[tuple[Range, nn.Parameter]]) -> tuple[Run, ...]:
    """Joins active slices, sorted by range, that touch."""
    return _joined(tuple(span for span, _ in active))


@lru_cache(maxsize=1024)
def _joined(spans: tuple[Range, ...]) -> tuple[Run, ...]:
    groups: list[list[Range]] = []
    for span in spans:
        if groups and groups[-1][-1][1] == span[0]:
            groups[-1].append(span)
        else:
            groups.append([span])
    return tuple(Run(start=g[0][0], stop=g[-1][1], members=tuple(g)) for g in groups)


def split(gradient: Tensor, dim: int, run: Run) -> list[Tensor]:
    """The slices of a run's gradient.

    Autograd keeps slices that are blocks of memory as they are, and copies others to memory of their own.
    """
    if len(run.members) == 1:
        return [gradient]
    return [gradient.narrow(dim, start - run.start, stop - start) for start, stop in run.members]


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The backward's dtypes are explicit; a caller's autocast must not change them."""
    if device_type == "meta" or not torch.amp.is_autocast_available(device_type):  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
