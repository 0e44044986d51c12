"""Splits one layer, or one unit outside the layers, into components."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import nn

from rgft.architectures.adapters import adapter_of
from rgft.architectures.blocks import Block, find_blocks, is_transformer, outermost
from rgft.architectures.channels import channel_ranges, find_convolutions
from rgft.architectures.layers import join
from rgft.architectures.patterns import ExpertsPattern, find, unwrapped
from rgft.architectures.roles import Range, head_ranges, neuron_ranges
from rgft.components import Component, Granularity, Kind, ParameterSlice
from rgft.errors import PartitionError
from rgft.placement import Placement, merged


class UnitSplit:
    """One layer, or one unit outside the layers, while it is split.

    Attributes:
        placement: where the model's parameters sit.
        path, depth: of the unit.
        layer: its path when it is a layer, else None.
        adapters: paths of the model's PEFT modules.
        ffn_blocks: neuron blocks per feed-forward block, and channel blocks per convolution, at head granularity.
        free: names of parameters that no component owns yet.
        made: components so far, in order.
    """

    def __init__(
        self, placement: Placement, path: str, depth: int, *, layer: str | None, adapters: set[str], ffn_blocks: int = 1
    ) -> None:
        self.placement, self.path, self.depth, self.layer = placement, path, depth, layer
        self.adapters, self.ffn_blocks = adapters, ffn_blocks
        self.free = list(placement.names_in(path))
        self.made: list[Component] = []

    def split_layer(self, granularity: Granularity) -> list[Component]:
        """Components of a layer.

        Raises:
            PartitionError: head granularity, and nobody knows what a matrix's rows and columns are.
        """
        if granularity == "layer":
            self._whole(self.path, "layer", self.free)
        elif granularity == "adapter":
            self._adapters(lambda name: True)
            self._whole(f"{self.path}.rest", "rest", self.free)
        elif self.free:
            self._split_blocks(granularity)
        return self.made

    def split_outside(self, granularity: Granularity, kind: Kind) -> list[Component]:
        """Components of a unit outside the layers: its PEFT modules where they are components, and itself."""
        if granularity in ("head", "adapter"):
            self._adapters(lambda name: True)
        self._whole(f"{self.path}.rest" if self.made else self.path, kind, self.free)
        return self.made

    @property
    def _module(self) -> nn.Module:
        module = find(self.placement.model, self.path)
        assert module is not None
        return module

    def _relative(self, name: str) -> str:
        return name[len(self.path) + 1 :] if self.path else name

    def _in(self, block: Block) -> list[str]:
        return [name for name in self.free if block.owns(self._relative(name))]

    def _whole(self, name: str, kind: Kind, names: Iterable[str], index: int | None = None) -> None:
        """A component that owns whole parameters; none when there are none."""
        owned = list(names)
        self.free = [free for free in self.free if free not in set(owned)]
        self._add(name, kind, [self.placement.slice_of(parameter) for parameter in owned], index)

    def _ranges(self, name: str, kind: Kind, groups: Sequence[Iterable[Range]]) -> None:
        """One component per group of ranges; a range of what is frozen or sits elsewhere is left out."""
        here = set(self.placement.names_in(self.path))
        cut: set[str] = set()
        for index, group in enumerate(groups):
            ranges = [(join(self.path, piece.parameter), piece) for piece in group]
            owned = [(parameter, piece) for parameter, piece in ranges if parameter in here]
            cut.update(parameter for parameter, _ in owned)
            slices = [self.placement.slice_of(n, piece.dim, piece.start, piece.stop) for n, piece in owned]
            self._add(f"{name}.{index}", kind, slices, index)
        self.free = [free for free in self.free if free not in cut]

    def _add(self, name: str, kind: Kind, slices: Sequence[ParameterSlice], index: int | None) -> None:
        if slices:
            component = Component(
                name=name, kind=kind, slices=merged(slices), depth=self.depth, layer=self.layer, index=index
            )
            self.made.append(component)

    def _adapters(self, within: Callable[[str], bool]) -> None:
        """One component per PEFT module (and adapter name, when it carries several) of what `within` accepts."""
        found: dict[str, dict[str, list[str]]] = {}
        for name in self.free:
            if within(self._relative(name)) and (owner := adapter_of(name, self.adapters)) is not None:
                found.setdefault(owner[0], {}).setdefault(owner[1], []).append(name)
        for path, carried in found.items():
            for adapter, names in carried.items():
                self._whole(path if len(carried) == 1 else join(path, adapter), "adapter", names)

    def _split_blocks(self, granularity: Granularity) -> None:
        blocks = find_blocks(self._module)
        if granularity == "block" or not is_transformer(blocks):
            if granularity == "head":
                self._adapters(lambda name: True)
            for block in outermost(blocks):
                is_split = granularity == "head" and self._split_convolutions(block.owns)
                name, kind = f"{self.path}.{block.name}", cast("Kind", block.kind)
                self._whole(f"{name}.rest" if is_split else name, "rest" if is_split else kind, self._in(block))
            if granularity == "head":
                self._split_convolutions(lambda name: True)  # of a layer that is one
        else:
            for block in blocks:
                self._split_block(block)
            self._adapters(lambda name: True)
            self._refuse_unknown(self.free)
        # A layer that is a single module (a convolution, a Linear) has no part beside the rest: it is the component.
        alone = not blocks and not self.made
        self._whole(self.path if alone else f"{self.path}.rest", "layer" if alone else "rest", self.free)

    def _split_block(self, block: Block) -> None:
        """Heads, neuron blocks or experts of a block, then its PEFT modules, then its rest."""
        name = f"{self.path}.{block.name}"
        if not self._in(block):
            return
        if block.experts is not None:
            self._split_experts(name, block.experts)
        elif block.kind == "conv_block":
            self._split_convolutions(block.owns)
        elif block.pattern is None:
            self._refuse_unknown(n for n in self._in(block) if adapter_of(n, self.adapters) is None)
        elif block.kind == "attention":
            self._ranges(f"{name}.head", "head", head_ranges(self._module, block.pattern, self.placement.config))
        else:
            ranges = neuron_ranges(self._module, block.pattern, self.ffn_blocks)
            self._ranges(f"{name}.ffn_block", "ffn_block", ranges)
        self._adapters(block.owns)
        if block.experts is not None:
            self._refuse_unknown(self._in(block))
        self._whole(f"{name}.rest", "rest", self._in(block))

    def _split_convolutions(self, within: Callable[[str], bool]) -> bool:
        """Blocks of output channels of the convolutions that `within` accepts; whether there are any.

        Convolutions of PEFT modules are none, and frozen ones are not split.
        """
        made = len(self.made)
        for convolution in find_convolutions(self._module):
            weight = join(self.path, convolution.path, "weight")
            is_free = weight in self.free and adapter_of(weight, self.adapters) is None
            if is_free and within(self._relative(weight)):
                path = join(self.path, convolution.path)
                self._ranges(
                    f"{path}.channel_block", "channel_block", channel_ranges(convolution, self.ffn_blocks)
                )  # fmt: skip
        return len(self.made) > made

    def _split_experts(self, name: str, pattern: ExpertsPattern) -> None:
        """One component per expert (index of dimension 0 of fused parameters, or one child each) and one router."""
        experts = find(self._module, pattern.experts)
        assert experts is not None
        if isinstance(experts, nn.ModuleList):
            for index in range(len(experts)):
                prefix = f"{pattern.experts}.{index}."
                owned = [free for free in self.free if self._relative(free).startswith(prefix)]
                self._whole(f"{name}.expert.{index}", "expert", owned, index)
        else:
            experts, path = unwrapped(experts, pattern.experts)
            shapes = {join(path, below): tuple(p.shape) for below, p in experts.named_parameters()}
            counts = {shape[0] for shape in shapes.values()}
            if len(counts) != 1:
                raise PartitionError(f"expected fused parameters [experts, …] in {path!r}, found {shapes}")
            groups = [[Range(parameter, 0, i, i + 1) for parameter in shapes] for i in range(counts.pop())]
            self._ranges(f"{name}.expert", "expert", groups)
        routers = tuple(f"{router}." for router in pattern.routers)
        self._whole(f"{name}.router", "router", [n for n in self.free if self._relative(n).startswith(routers)])

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        """Raises PartitionError when a matrix is left of which nobody knows what its rows are."""
        for name in names:
            module = find(self.placement.model, name.rpartition(".")[0])
            if len(self.placement.slice_of(name).shape) >= 2 and not isinstance(module, nn.Embedding):
                raise PartitionError(
                    f"no known pattern says which rows and columns of {name!r} ({type(module).__name__}) are which "
                    "head or neuron block"
                )
