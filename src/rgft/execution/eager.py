"""Keeping `torch.compile` out of code that acts beside the model: what it books or looks up is no part of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function, *, recursive: bool = True) -> Function:
    """The function, which a compiled model calls as it is.

    Args:
        function: a hook, or what takes the place of a module's forward.
        recursive: whether what it calls is not compiled either.
    """
    return torch.compiler.disable(function, recursive=recursive)  # type: ignore[no-any-return]
