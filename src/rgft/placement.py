"""Where every trainable parameter of a model sits: in which layer or outside unit, and under which name.

Trainable is what requires gradients and is floating point. A tied weight sits once, where it is used lowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rgft.architectures.layers import find_structure
from rgft.components import ParameterSlice
from rgft.errors import PartitionError


class Placement:
    """Every trainable parameter's place.

    Attributes:
        model: the model.
        config: its configuration, if it has one.
        structure: its layers and outside units.
        shapes: canonical name (as in `model.named_parameters()`) → shape, of every trainable parameter.
        canonical: name under which a parameter sits (its lowest use) → canonical name.
        aliases: every name of a trainable parameter → canonical name.

    Raises:
        PartitionError: nothing is trainable.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.structure = find_structure(model)
        first = {id(p): name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
        if not first:
            raise PartitionError(
                f"{type(model).__name__} has no trainable parameter (floating point, requires_grad); "
                "call requires_grad_(True) on what shall be trained"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        lowest: dict[int, tuple[int, str]] = {}
        for name, parameter in parameters.items():
            if id(parameter) in first:
                depth = self.structure.place(name)[1]
                if id(parameter) not in lowest or depth < lowest[id(parameter)][0]:
                    lowest[id(parameter)] = (depth, name)
        self.canonical = {name: first[key] for key, (_, name) in lowest.items()}
        self.aliases = {name: first[id(p)] for name, p in parameters.items() if id(p) in first}
        self.shapes = {name: tuple(parameters[name].shape) for name in first.values()}
        self._inside: dict[str, list[str]] = {}
        for name in self.canonical:
            self._inside.setdefault(self.structure.place(name)[0], []).append(name)

    def names_in(self, path: str) -> list[str]:
        """Names of the parameters that sit in the layer or outside unit at `path`."""
        return self._inside.get(path, [])

    def slice_of(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> ParameterSlice:
        """A slice of the parameter that sits under `name`; the whole of it without `dim`."""
        parameter = self.canonical[name]
        return ParameterSlice(parameter=parameter, shape=self.shapes[parameter], dim=dim, start=start, stop=stop)


def merged(slices: Sequence[ParameterSlice]) -> tuple[ParameterSlice, ...]:
    """Slices of one parameter that touch become one, and one that covers it becomes the whole parameter."""
    merged: list[ParameterSlice] = []
    for part in slices:
        for index, other in enumerate(merged):
            if part.parameter == other.parameter and part.dim == other.dim and other.stop == part.start != 0:
                part = ParameterSlice(
                    parameter=part.parameter, shape=part.shape, dim=part.dim, start=other.start, stop=part.stop
                )
                merged[index] = part
                break
        else:
            merged.append(part)
    return tuple(
        ParameterSlice(parameter=part.parameter, shape=part.shape)
        if part.dim is not None and part.start == 0 and part.stop == part.shape[part.dim]
        else part
        for part in merged
    )
