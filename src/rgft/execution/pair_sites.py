"""Where low-rank pairs can be: weights of linear layers that some component owns, whole or in slices."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from rgft.architectures.adapters import adapter_of, adapter_paths
from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import ConfigError, RGFTWarning
from rgft.execution.linear import Layout, layout_of
from rgft.execution.pairs import CHILD

SETTING = "update.low_rank.components"


@dataclass(frozen=True, kw_only=True)
class PairSite:
    """A place for a pair.

    Attributes:
        component: that owns the slice.
        position: of the slice among the component's.
        part: the slice.
        module: path of the linear module.
        layout: how that keeps its weight.
        inputs, outputs: sizes of the slice.
    """

    component: str
    position: int
    part: ParameterSlice
    module: str
    layout: Layout

    @property
    def outputs(self) -> int:
        return self._size(self.layout.output_dim)

    @property
    def inputs(self) -> int:
        return self._size(1 - self.layout.output_dim)

    def _size(self, dim: int) -> int:
        return self.part.stop - self.part.start if self.part.dim == dim else self.part.shape[dim]


def find_sites(
    model: nn.Module, partition: Partition, wanted: Collection[str], *, rank: int
) -> dict[str, tuple[PairSite, ...]]:
    """Component → its sites, for those of the wanted components that have any.

    What belongs to no linear module that is called as such (embeddings, kernels, packed projections, stacked experts)
    is no site.

    Args:
        model: plain.
        partition: of it.
        wanted: names of components.
        rank: of the pairs.

    Raises:
        ConfigError: none has a site; a component is an adapter, or shares a linear weight between modules. All
            problems together.

    Warns:
        RGFTWarning: pairs of this rank have at least as many elements as the slices that they stand for.
    """
    adapters = adapter_paths(model)
    holders = _holders(model)
    packed = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    problems: list[str] = []
    found: dict[str, list[PairSite]] = defaultdict(list)
    for component in partition:
        if component.name not in wanted:
            continue
        if why := _is_adapter(component, adapters):
            problems.append(why)
            continue
        for position, part in enumerate(component.slices):
            path, _, attribute = part.parameter.rpartition(".")
            module = model.get_submodule(path)
            layout = layout_of(module)
            if attribute != "weight" or not isinstance(layout, Layout) or id(module) in packed:
                continue
            shared = holders[id(getattr(module, attribute))]
            if len(shared) > 1:
                problems.append(
                    f"{component.name}: {part.parameter!r} is shared by {', '.join(map(repr, shared))}, and a pair "
                    "would belong to one of them only"
                )
                continue
            if hasattr(module, CHILD):
                problems.append(f"{path!r} has something named {CHILD!r} already, where its pairs were to go")
                continue
            whole = part if part.fraction < 1.0 else ParameterSlice(parameter=part.parameter, shape=part.shape)
            found[component.name].append(
                PairSite(component=component.name, position=position, part=whole, module=path, layout=layout)
            )
    if not found and not problems:
        problems.append("expected a component with the weight of a linear layer (nn.Linear, Conv1D), found none")
    if problems:
        raise ConfigError([f"{SETTING}: {problem}" for problem in problems])
    _warn_of_large((site for sites in found.values() for site in sites), rank)
    return {name: tuple(sites) for name, sites in found.items()}


def _is_adapter(component: Component, paths: set[str]) -> str | None:
    inside = [part.parameter for part in component.slices if adapter_of(part.parameter, paths) is not None]
    if component.kind != "adapter" and not inside:
        return None
    return (
        f"{component.name} is, or holds, an adapter already ({inside[0] if inside else component.kind!r}), which is "
        "of low rank itself; leave it out, or leave out PEFT"
    )


def _holders(model: nn.Module) -> Mapping[int, list[str]]:
    """Paths of the modules in which each parameter is registered."""
    holders: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(path)
    return holders


def _warn_of_large(sites: Iterable[PairSite], rank: int) -> None:
    everything = list(sites)
    large = [s for s in everything if rank * (s.inputs + s.outputs) >= s.inputs * s.outputs]
    if large:
        first = large[0]
        most = first.inputs * first.outputs / (first.inputs + first.outputs)
        warnings.warn(
            f"update.low_rank.rank: pairs of rank {rank} save nothing at {len(large)} of {len(everything)} places, "
            f"e.g. {first.part.parameter!r} in {first.component}, {first.outputs} × {first.inputs}; expected "
            f"less than {most:.3g} there, or a coarser granularity",
            RGFTWarning, stacklevel=2,
        )  # fmt: skip
