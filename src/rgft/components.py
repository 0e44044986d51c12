"""Components: which part of which parameter a logical unit of the model owns.

A model is described by a `Partition`: its components, each a set of parameter slices, and its layers in forward
order. Depth is that order: 0 is what runs before the first layer (embeddings), 1…n are the layers, n+1 is what runs
after the last (final norm, pooler, classifier, LM head). The cut of a plan is a depth: everything below it is off.

How a model is split is `partition.py`'s matter; nothing here touches a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rgft.errors import PartitionError

Granularity = Literal["layer", "block", "head", "adapter"]

#: What a component is. A closed list, because presets and baselines select by it.
Kind = Literal[
    "embedding", "layer", "attention", "ffn", "head", "ffn_block", "rest", "norm", "classifier", "lm_head",
    "adapter", "expert", "router", "stage", "conv_block", "channel_block", "other",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParameterSlice:
    """A contiguous range of one named parameter along one dimension.

    Attributes:
        parameter: name as in `model.named_parameters()` (for a tied weight, its first name there).
        shape: shape of the whole parameter.
        dim: dimension that is sliced; `None` means the whole parameter.
        start, stop: range along `dim` (both 0 for a whole parameter).
    """

    parameter: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def __post_init__(self) -> None:
        if self.dim is None:
            return
        if not 0 <= self.dim < len(self.shape) or not 0 <= self.start < self.stop <= self.shape[self.dim]:
            raise PartitionError(
                f"slice {self.start}:{self.stop} of dimension {self.dim} does not lie inside {self.parameter!r} "
                f"of shape {self.shape}; expected 0 <= start < stop <= the dimension's size"
            )

    @property
    def is_whole(self) -> bool:
        return self.dim is None

    @property
    def fraction(self) -> float:
        """Share of the parameter's elements that the slice holds."""
        return 1.0 if self.dim is None else (self.stop - self.start) / self.shape[self.dim]

    @cached_property
    def numel(self) -> int:
        total = 1
        for dim, size in enumerate(self.shape):
            total *= self.stop - self.start if dim == self.dim else size
        return total

    def of(self, tensor: Any) -> Any:
        """The slice of `tensor`, a view that shares its memory."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A logical unit of the model: a head, an FFN block, a layer, an adapter, …

    Attributes:
        name: unique, e.g. `bert.encoder.layer.3.attention.head.5`.
        kind: what it is.
        slices: the parameter slices it owns; no other component owns any element of them.
        depth: position in forward order (see the module's docstring).
        layer: module path of the layer it belongs to, or None outside the layers.
        index: which head, FFN block, expert or block of channels of its block it is, or None.
    """

    name: str
    kind: Kind
    slices: tuple[ParameterSlice, ...]
    depth: int
    layer: str | None = None
    index: int | None = None

    @cached_property
    def numel(self) -> int:
        """Number of elements owned."""
        return sum(part.numel for part in self.slices)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """All components of a model, in forward order, and its layers.

    Attributes:
        components: ordered by depth, then by position inside the layer.
        layers: module paths of the layers in forward order; the layer at position i has depth i+1.
        granularity: the name it was made with (`"custom"` for a user's function).
        family: name of the architecture table that matched (`"generic"` when split by structure alone).
    """

    components: tuple[Component, ...]
    layers: tuple[str, ...]
    granularity: str
    family: str = "generic"

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise PartitionError(f"component names must be unique; found more than once: {', '.join(repeated)}")

    def __iter__(self) -> Iterator[Component]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __getitem__(self, name: str) -> Component:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> Mapping[str, Component]:
        return {component.name: component for component in self.components}

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(component.name for component in self.components)

    @property
    def max_cut(self) -> int:
        """The highest cut that leaves something on: only what runs after the last layer."""
        return max(component.depth for component in self.components)

    @cached_property
    def numel(self) -> int:
        return sum(component.numel for component in self.components)

    def above(self, cut: int) -> tuple[Component, ...]:
        """Components at or above the cut."""
        return tuple(component for component in self.components if component.depth >= cut)

    def share_above(self, cut: int) -> float:
        """Share of the layers that lie at or above the cut; 1 without layers."""
        return min(1.0, (len(self.layers) + 1 - cut) / len(self.layers)) if self.layers else 1.0

    def check_cover(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises PartitionError unless every element of `shapes` (parameter name → shape) has exactly one owner."""
        problems: list[str] = []
        owned: dict[str, list[tuple[str, ParameterSlice]]] = {name: [] for name in shapes}
        for component in self.components:
            for part in component.slices:
                if part.parameter not in owned:
                    problems.append(f"{component.name} owns {part.parameter!r}, which is no trainable parameter")
                elif part.shape != tuple(shapes[part.parameter]):
                    problems.append(f"{component.name}: {part.parameter!r} has shape {tuple(shapes[part.parameter])}")
                else:
                    owned[part.parameter].append((component.name, part))
        for name, parts in owned.items():
            problems.extend(_cover_problems(name, tuple(shapes[name]), parts))
        if problems:
            raise PartitionError(
                "every trainable element must lie in exactly one component:\n  " + "\n  ".join(problems) + "\n"
                "pass granularity=<function> that maps component names to parameters or ParameterSlices"
            )


def _cover_problems(name: str, shape: tuple[int, ...], parts: list[tuple[str, ParameterSlice]]) -> list[str]:
    if not parts:
        return [f"{name!r} of shape {shape} is in no component"]
    if any(part.is_whole for _, part in parts):
        return [] if len(parts) == 1 else [f"{name!r} is in several: {', '.join(owner for owner, _ in parts)}"]
    dims = {part.dim for _, part in parts}
    if len(dims) > 1:
        return [f"{name!r} is sliced along several dimensions: {sorted(d for d in dims if d is not None)}"]
    position = 0
    for owner, part in sorted(parts, key=lambda item: item[1].start):
        if part.start > position:
            return [f"{name!r}: nothing owns {position}:{part.start} of dimension {part.dim}"]
        if part.start < position:
            return [f"{name!r}: {part.start}:{min(position, part.stop)} is owned twice, also by {owner}"]
        position = part.stop
    (dim,) = dims
    assert dim is not None
    return [] if position == shape[dim] else [f"{name!r}: nothing owns {position}:{shape[dim]} of dimension {dim}"]
