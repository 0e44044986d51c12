"""The mean of the last iterates: what a run leaves behind instead of its last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rgft.execution.binding import Binding


class IterateAverage:
    """Averages the weights after each step, of the components that are updated meanwhile and of no others.

    Late steps walk around a minimum; their mean lies nearer to it than any of them, and stands a higher learning rate
    (Polyak & Juditsky 1992; with networks: Izmailov et al. 2018, Kaddour 2022). A component that goes off meanwhile
    counts with the value that it keeps, one that comes on with the value that it had. Means are kept in fp32 at least.
    Statistics of batch normalisation are averaged with the weights that they belong to. Of a low-rank pair, A and B are
    averaged each by itself: the mean of their products would be of full rank.

    Args:
        binding: the components' live parameters.
        buffers: of the model; those of floating point are averaged, which leaves constant ones as they are.
    """

    def __init__(self, binding: Binding, buffers: Iterable[Tensor] = ()) -> None:
        self._binding = binding
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._buffer_means: list[Tensor] = []
        self._count = 0
        self._means: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """Iterates averaged so far."""
        return self._count

    def tensors(self) -> list[Tensor]:
        """All means that are kept now."""
        return [*self._buffer_means, *(mean for means in self._means.values() for mean in means)]

    @torch.no_grad()
    def before_merge(self, components: Iterable[str]) -> None:
        """Moves the means of pairs that are about to be merged into their weights into these weights' means."""
        low_rank = self._binding.low_rank
        if low_rank is None:
            return
        for name in components:
            means = self._means.pop(low_rank.pair_part(name), None)
            if means is not None:
                part = low_rank.weight_part(name)
                weights = self._means.setdefault(part, self._current(part))
                torch._foreach_add_(weights, low_rank.deltas(name, means))  # pyright: ignore[reportPrivateImportUsage]

    def before_step(self, active: Iterable[str]) -> None:
        """Takes note of what parts of the binding were that the step will be the first to update."""
        if self._count:
            for name in active:
                if name not in self._means:
                    self._means[name] = self._current(name)

    @torch.no_grad()
    def after_step(self, active: Iterable[str]) -> None:
        """Adds the weights as the step left them."""
        self._count += 1
        for name in active:
            if name not in self._means:  # the first step of all
                self._means[name] = self._current(name)
        if not self._buffer_means:
            self._buffer_means = [buffer.clone() for buffer in self._buffers]
        for mean, buffer in zip(self._buffer_means, self._buffers, strict=True):
            mean.lerp_(buffer, 1.0 / self._count)
        for name, means in self._means.items():
            if not means:  # all that the component has are weights with a pair
                continue
            current = [p.detach().to(mean.dtype) for p, mean in zip(self._binding.parts[name], means, strict=True)]
            torch._foreach_lerp_(means, current, 1.0 / self._count)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights by their means, and forgets these."""
        for name, means in self._means.items():
            for parameter, mean in zip(self._binding.parts[name], means, strict=True):
                parameter.copy_(mean)
        for mean, buffer in zip(self._buffer_means, self._buffers, strict=bool(self._count)):
            buffer.copy_(mean)
        self._count, self._means, self._buffer_means = 0, {}, []

    def _current(self, name: str) -> list[Tensor]:
        return [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._binding.parts[name]
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self._count,
            "means": {k: [mean.clone() for mean in means] for k, means in self._means.items()},
            "buffer_means": [mean.clone() for mean in self._buffer_means],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._means = {
            name: [mean.to(p.device, copy=True) for mean, p in zip(means, self._binding.parts[name], strict=True)]
            for name, means in state["means"].items()
        }
        self._buffer_means = [
            mean.to(buffer.device, copy=True)
            for mean, buffer in zip(state["buffer_means"], self._buffers, strict=False)
        ]
