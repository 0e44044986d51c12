"""The binding: which live tensors a component's slices are, from attaching to detaching."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from rgft.components import Component, Partition

if TYPE_CHECKING:
    from rgft.execution.low_rank import LowRank


@dataclass(kw_only=True)
class Binding:
    """Component name → trainable parameters, one per slice, in the order of `Component.slices`.

    Whole parameters are the model's own. Slices are views that share memory with the weight they are part of
    (`views.py` makes them and gives `restore` and `check`).

    Attributes:
        partition: the components bound.
        parameters: component name → parameters.
        names: parameter names as the model shows them now, aligned with `parameters`.
        restore: puts the model back as it was; no trace is left.
        check: raises StorageError when a view no longer shares its weight's memory.
        plain: a context in which the model shows whole parameters, as before binding.
        make_dense: stores the weights of these parameters such that each slice is one block of memory, until `restore`.
        low_rank: the pairs that some components have beside their weights; None: none has any.
    """

    partition: Partition
    parameters: dict[str, tuple[nn.Parameter, ...]]
    names: dict[str, tuple[str, ...]]
    restore: Callable[[], None]
    check: Callable[[], None]
    plain: Callable[[], AbstractContextManager[None]] = nullcontext
    make_dense: Callable[[Iterable[nn.Parameter]], None] = lambda _: None
    low_rank: LowRank | None = None
    _owners: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._owners = {id(p): name for name, params in self.parameters.items() for p in params}

    def __iter__(self) -> Iterator[tuple[Component, tuple[nn.Parameter, ...]]]:
        for component in self.partition:
            yield component, self.parameters[component.name]

    def owner(self, parameter: nn.Parameter) -> str | None:
        """Name of the component that the parameter belongs to, or None; low-rank pairs belong to theirs."""
        if (name := self._owners.get(id(parameter))) is not None or self.low_rank is None:
            return name
        return self.low_rank.owner(parameter)

    # ---------------------------------------------------------------- in the form that components have

    @property
    def held(self) -> Mapping[str, tuple[nn.Parameter, ...]]:
        """Component → all parameters that it may ever train, low-rank pairs included."""
        return self.parameters if self.low_rank is None else self.low_rank.held

    @property
    def trained(self) -> Mapping[str, tuple[nn.Parameter, ...]]:
        """Component → parameters that are trained of it, aligned with its slices in `as_trained`."""
        return self.parameters if self.low_rank is None else self.low_rank.trained

    @property
    def as_trained(self) -> Partition:
        """The components with the slices that are trained of them."""
        return self.partition if self.low_rank is None else self.low_rank.as_trained

    @property
    def parts(self) -> Mapping[str, tuple[nn.Parameter, ...]]:
        """What goes on and off by itself, and its parameters: components, or parts of those that may take pairs."""
        return self.parameters if self.low_rank is None else self.low_rank.parts

    def part_of(self, parameter: nn.Parameter) -> str | None:
        """Name of the part that the parameter belongs to, or None."""
        return self._owners.get(id(parameter)) if self.low_rank is None else self.low_rank.part_of(parameter)

    def parts_on(self, active: Collection[str]) -> frozenset[str]:
        """Parts that are trained while the components `active` are on."""
        return frozenset(active) if self.low_rank is None else self.low_rank.parts_on(active)
