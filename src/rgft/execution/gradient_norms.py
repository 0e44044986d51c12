"""‖∇_{θ_k} L‖² of every component that has a gradient, once a step."""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import reduce
from itertools import compress, repeat

import torch
from torch import Tensor, nn

from rgft.execution.binding import Binding


class GradientNorms:
    """Reads the norms of gradients. What does not change between steps is kept: a step has a millisecond for all else.

    Args:
        binding: whose components.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._parts: frozenset[str] | None = None  # what the rest was made of
        self._parameters: list[nn.Parameter] = []
        self._owners: list[str] = []
        self._dtype = torch.float32

    def squared(self, parts: frozenset[str]) -> dict[str, float]:
        """‖∇‖² by component, of those with a gradient; one device synchronisation.

        Args:
            parts: of the binding, that are on.
        """
        if self._parts is None or (parts is not self._parts and parts != self._parts):
            self._look(parts)
        gradients: list[Tensor] = [p.grad for p in self._parameters]  # type: ignore[misc]
        owners = self._owners
        is_there = list(map(operator.is_not, gradients, repeat(None)))
        if not all(is_there):  # experts that no token came to
            gradients, owners = list(compress(gradients, is_there)), list(compress(owners, is_there))
        if not gradients:
            return {}
        norms = torch._foreach_norm(gradients, 2, self._dtype)  # pyright: ignore[reportPrivateImportUsage]
        found = dict.fromkeys(owners, 0.0)
        for name, squared in zip(owners, torch.stack(norms).double().square().tolist(), strict=True):
            found[name] += squared
        return found

    def _look(self, parts: Collection[str]) -> None:
        """What is off has no gradient: its flag was taken back, and its gradient with it."""
        self._parts = frozenset(parts)
        trained = {id(p) for part, held in self._binding.parts.items() if part in parts for p in held}
        pairs = [(p, name) for name, held in self._binding.held.items() for p in held if id(p) in trained]
        self._parameters, self._owners = [p for p, _ in pairs], [name for _, name in pairs]
        self._dtype = reduce(torch.promote_types, {p.dtype for p, _ in pairs}, torch.float32)
