"""Splits a model into components at a granularity of choice.

`architectures` knows how models are built; here that becomes a `Partition` of the trainable elements: parameters that
require gradients and are floating point. A tied weight sits once, where it is used lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast, get_args

from torch import nn

from rgft.architectures.adapters import adapter_of, adapter_paths
from rgft.architectures.patterns import ATTENTION, matches
from rgft.components import Component, Granularity, Kind, ParameterSlice, Partition
from rgft.errors import PartitionError
from rgft.placement import Placement, merged
from rgft.splitting import UnitSplit

#: A user's own split: component name → parameter names or slices of parameters.
SplitFunction = Callable[[nn.Module], Mapping[str, Sequence[str | ParameterSlice]]]


def partition(
    model: nn.Module, granularity: Granularity | SplitFunction = "layer", *, ffn_blocks: int = 1
) -> Partition:
    """All components of the model.

    - `layer`: one component per layer.
    - `block`: attention, cross-attention and feed-forward (or, in layers without attention, each convolution with its
      norm, or each child); what lies in none is `<layer>.rest`.
    - `head`: attention heads (with grouped-query attention one key/value group with its query heads), `ffn_blocks`
      neuron blocks per feed-forward block, experts and router; norms, output biases and relative-position tables are
      `<block>.rest`. PEFT modules stay whole, since heads share their low-rank factors. Each convolution of a layer is
      split into `ffn_blocks` blocks of output channels (never more than it has), with their biases and their part of
      the batch norm that is registered right behind it; the rest of layers without attention is split as for `block`.
    - `adapter`: each PEFT module (for example a LoRA pair) with its trainable parameters.
    - a function: its components, of kind `other`; what lies in one module outside the layers is of that module's kind.

    Outside the layers there is one component per module, whatever the granularity: embeddings at depth 0; final norms,
    the classifier (poolers count as part of it) and the LM head at depth n+1; what runs between two stacks (T5's
    encoder norm) at the depth of the layer before it.

    Args:
        model: on any device and of any dtype; it is only looked at.
        granularity: a name, or a function from the model to component names and what they own.
        ffn_blocks: neuron blocks per feed-forward block, and channel blocks per convolution, at head granularity.

    Raises:
        PartitionError: nothing is trainable; a block cannot be split; no PEFT module at adapter granularity; a
            user's function leaves out elements or names them twice.
    """
    if isinstance(ffn_blocks, bool) or not isinstance(ffn_blocks, int) or ffn_blocks < 1:
        raise PartitionError(f"ffn_blocks: expected an integer >= 1, found {ffn_blocks!r}")
    if not callable(granularity) and granularity not in get_args(Granularity):
        raise PartitionError(
            f"granularity: expected one of {', '.join(get_args(Granularity))} or a function, found {granularity!r}"
        )
    placement = Placement(model)
    components = (
        _custom(placement, granularity(model))
        if callable(granularity)
        else _split(placement, granularity, ffn_blocks=ffn_blocks)
    )
    layers = placement.structure.layers
    result = Partition(
        components=tuple(sorted(components, key=lambda c: (c.depth, c.layer is None))),
        layers=layers,
        granularity="custom" if callable(granularity) else granularity,
        family=_family(model, layers),
    )
    result.check_cover(placement.shapes)
    return result


def _family(model: nn.Module, layers: Iterable[str]) -> str:
    modules = (model.get_submodule(path) for path in layers)
    return next((found.family for module in modules for found in matches(module, ATTENTION)), "generic")


def _split(placement: Placement, granularity: Granularity, *, ffn_blocks: int) -> list[Component]:
    adapters = adapter_paths(placement.model)
    if granularity == "adapter" and not any(adapter_of(name, adapters) for name in placement.canonical):
        raise PartitionError(
            f"granularity 'adapter': {type(placement.model).__name__} has no trainable PEFT module (none with the "
            "attribute adapter_layer_names); wrap the model with peft.get_peft_model first, or use another granularity"
        )
    components: list[Component] = []
    for unit in placement.structure.outside:
        split = UnitSplit(placement, unit.path, unit.depth, layer=None, adapters=adapters)
        components += split.split_outside(granularity, cast("Kind", unit.kind))
    problems: list[str] = []
    for position, path in enumerate(placement.structure.layers):
        split = UnitSplit(placement, path, position + 1, layer=path, adapters=adapters, ffn_blocks=ffn_blocks)
        try:
            components += split.split_layer(granularity)
        except PartitionError as problem:
            problems.append(f"{path}: {problem}")
    if problems:
        more = f"\n  … and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise PartitionError(
            f"granularity {granularity!r} cannot split these layers:\n  " + "\n  ".join(problems[:4]) + more + "\n"
            "use granularity='block', or pass a function that maps component names to parameters or ParameterSlices"
        )
    return components


def _custom(placement: Placement, owned_by: Mapping[str, Sequence[str | ParameterSlice]]) -> list[Component]:
    components: list[Component] = []
    problems: list[str] = []
    kinds = {unit.path: unit.kind for unit in placement.structure.outside}
    places = {canonical: placement.structure.place(name) for name, canonical in placement.canonical.items()}
    for name, owned in owned_by.items():
        slices: list[ParameterSlice] = []
        for item in owned:
            parameter = placement.aliases.get(item if isinstance(item, str) else item.parameter)
            if parameter is None:
                problems.append(f"{name!r} names {item!r}, which is no trainable parameter")
            elif isinstance(item, str):
                slices.append(ParameterSlice(parameter=parameter, shape=placement.shapes[parameter]))
            else:
                slices.append(replace(item, parameter=parameter))
        if not slices:
            problems.append(f"{name!r} owns nothing")
            continue
        path, depth = min((places[part.parameter] for part in slices), key=lambda place: place[1])
        is_of_one = all(places[part.parameter][0] == path for part in slices)
        layer = path if is_of_one and path in placement.structure.layers else None
        kind = cast("Kind", kinds.get(path, "other")) if is_of_one else "other"
        components.append(Component(name=name, kind=kind, slices=merged(slices), depth=depth, layer=layer))
    if problems:
        raise PartitionError("the granularity function is wrong:\n  " + "\n  ".join(problems))
    return components
