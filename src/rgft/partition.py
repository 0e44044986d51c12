"""Splits a model into components at a granularity of choice.

`architectures` knows how models are built; here that becomes a `Partition` of the trainable elements: parameters that
require gradients and are floating point. A tied weight sits once, where it is used lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast, get_args

from torch import nn

from rgft.architectures.adapters import adapter_of, adapter_paths
from rgft.architectures.blocks import Block, find_blocks, is_transformer
from rgft.architectures.layers import Structure, find_structure, join, module_at
from rgft.architectures.patterns import ATTENTION, find, matches
from rgft.architectures.roles import Range, head_ranges, neuron_ranges
from rgft.components import Component, Granularity, Kind, ParameterSlice, Partition
from rgft.errors import PartitionError

#: A user's own split: component name → parameter names or slices of parameters.
SplitFunction = Callable[[nn.Module], Mapping[str, Sequence[str | ParameterSlice]]]

_REMEDY = "use granularity='block', or pass a function that maps component names to parameters or ParameterSlices"


def partition(
    model: nn.Module, granularity: Granularity | SplitFunction = "layer", *, ffn_blocks: int = 1
) -> Partition:
    """All components of the model.

    - `layer`: one component per layer.
    - `block`: attention, cross-attention and feed-forward (or, in layers without attention, each convolution with its
      norm, or each child); what lies in none is `<layer>.rest`.
    - `head`: attention heads (with grouped-query attention one key/value group with its query heads), `ffn_blocks`
      neuron blocks per feed-forward block, experts and router; norms, output biases and relative-position tables are
      `<block>.rest`. PEFT modules stay whole, since heads share their low-rank factors. Layers without attention are
      split as for `block`.
    - `adapter`: each PEFT module (for example a LoRA pair) with its trainable parameters.
    - a function: its components, of kind `other`.

    Outside the layers there is one component per module, whatever the granularity: embeddings at depth 0; final norms,
    the classifier (poolers count as part of it) and the LM head at depth n+1; what runs between two stacks (T5's
    encoder norm) at the depth of the layer before it.

    Args:
        model: on any device and of any dtype; it is only looked at.
        granularity: a name, or a function from the model to component names and what they own.
        ffn_blocks: neuron blocks per feed-forward block at head granularity.

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
    splitter = _Splitter(model, ffn_blocks)
    components = splitter.custom(granularity(model)) if callable(granularity) else splitter.split(granularity)
    layers = splitter.structure.layers
    result = Partition(
        components=tuple(sorted(components, key=lambda c: (c.depth, c.layer is None))),
        layers=layers,
        granularity="custom" if callable(granularity) else granularity,
        family=next((found.family for path in layers for found in matches(_at(model, path), ATTENTION)), "generic"),
    )
    result.check_cover(splitter.shapes)
    return result


def _at(model: nn.Module, path: str) -> nn.Module:
    module = find(model, path)
    assert module is not None
    return module


def _is_trainable(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_floating_point()


class _Splitter:
    """Where every trainable parameter sits, and how each granularity splits it.

    Attributes:
        structure: layers and outside units.
        shapes: canonical name → shape of every trainable parameter.
        canonical: name under which a parameter sits (its lowest use) → its name in `model.named_parameters()`.
    """

    def __init__(self, model: nn.Module, ffn_blocks: int) -> None:
        self.model, self.ffn_blocks = model, ffn_blocks
        self.config: Any = getattr(model, "config", None)
        self.structure: Structure = find_structure(model)
        first = {id(p): name for name, p in model.named_parameters() if _is_trainable(p)}
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

    def split(self, granularity: Granularity) -> list[Component]:
        adapters = adapter_paths(self.model)
        if granularity == "adapter" and not any(adapter_of(name, adapters) for name in self.canonical):
            raise PartitionError(
                f"granularity 'adapter': {type(self.model).__name__} has no trainable PEFT module (none has the "
                "attribute adapter_layer_names); wrap the model with peft.get_peft_model first, or use another one"
            )
        components: list[Component] = []
        for unit in self.structure.outside:
            work = _Work(self, unit.path, unit.depth, layer=None)
            if granularity in ("head", "adapter"):
                work.adapters(adapters)
            work.whole(unit.path, cast("Kind", unit.kind), work.free)
            components += work.made
        problems: list[str] = []
        for position, path in enumerate(self.structure.layers):
            work = _Work(self, path, position + 1, layer=path)
            try:
                _split_layer(work, granularity, adapters)
            except PartitionError as problem:
                problems.append(f"{path}: {problem}")
            components += work.made
        if problems:
            shown = "\n  ".join(problems[:4]) + (f"\n  … and {len(problems) - 4} more" if len(problems) > 4 else "")
            raise PartitionError(f"granularity {granularity!r} cannot split these layers:\n  {shown}\n{_REMEDY}")
        return components

    def custom(self, split: Mapping[str, Sequence[str | ParameterSlice]]) -> list[Component]:
        components: list[Component] = []
        problems: list[str] = []
        position = {canonical: self.structure.place(name) for name, canonical in self.canonical.items()}
        for name, owned in split.items():
            slices: list[ParameterSlice] = []
            for item in owned:
                parameter = self.aliases.get(item if isinstance(item, str) else item.parameter)
                if parameter is None:
                    problems.append(f"{name!r} names {item!r}, which is no trainable parameter")
                elif isinstance(item, str):
                    slices.append(ParameterSlice(parameter=parameter, shape=self.shapes[parameter]))
                else:
                    slices.append(
                        ParameterSlice(
                            parameter=parameter, shape=item.shape, dim=item.dim, start=item.start, stop=item.stop
                        )
                    )
            places = {position[part.parameter] for part in slices}
            if not places:
                problems.append(f"{name!r} owns nothing")
                continue
            path, depth = min(places, key=lambda place: place[1])
            layer = path if len(places) == 1 and path in self.structure.layers else None
            components.append(Component(name=name, kind="other", slices=_merged(slices), depth=depth, layer=layer))
        if problems:
            raise PartitionError("the granularity function is wrong:\n  " + "\n  ".join(problems))
        return components

    def names_in(self, path: str) -> list[str]:
        return self._inside.get(path, [])


class _Work:
    """One layer or outside unit while it is being split: what is still free, and the components made so far."""

    def __init__(self, splitter: _Splitter, path: str, depth: int, layer: str | None) -> None:
        self.splitter, self.path, self.depth, self.layer = splitter, path, depth, layer
        self.module = find(splitter.model, path)
        self.free = list(splitter.names_in(path))
        self.made: list[Component] = []

    def relative(self, name: str) -> str:
        return name[len(self.path) + 1 :] if self.path else name

    def whole(self, name: str, kind: Kind, names: Iterable[str], index: int | None = None) -> None:
        """A component that owns whole parameters; none when there are none."""
        slices = []
        for owned in list(names):
            self.free.remove(owned)
            parameter = self.splitter.canonical[owned]
            slices.append(ParameterSlice(parameter=parameter, shape=self.splitter.shapes[parameter]))
        self._add(name, kind, slices, index)

    def ranges(self, name: str, kind: Kind, groups: Sequence[Iterable[Range]]) -> None:
        """One component per group of ranges; a range of what is frozen or sits elsewhere is left out."""
        for index, group in enumerate(groups):
            slices = []
            for piece in group:
                owned = join(self.path, piece.parameter)
                if owned not in self.splitter.names_in(self.path):
                    continue
                if owned in self.free:
                    self.free.remove(owned)
                parameter = self.splitter.canonical[owned]
                shape = self.splitter.shapes[parameter]
                slices.append(
                    ParameterSlice(parameter=parameter, shape=shape, dim=piece.dim, start=piece.start, stop=piece.stop)
                )
            self._add(f"{name}.{index}", kind, slices, index)

    def _add(self, name: str, kind: Kind, slices: list[ParameterSlice], index: int | None) -> None:
        if slices:
            self.made.append(
                Component(name=name, kind=kind, slices=_merged(slices), depth=self.depth, layer=self.layer, index=index)
            )

    def adapters(self, tuners: set[str], within: Callable[[str], bool] = lambda name: True) -> None:
        """One component per PEFT module (and adapter name, when it carries several) of what `within` accepts."""
        found: dict[str, dict[str, list[str]]] = {}
        for name in self.free:
            if within(self.relative(name)) and (owner := adapter_of(name, tuners)) is not None:
                found.setdefault(owner[0], {}).setdefault(owner[1], []).append(name)
        for path, adapters in found.items():
            for adapter, names in adapters.items():
                self.whole(path if len(adapters) == 1 else join(path, adapter), "adapter", names)


def _merged(slices: Sequence[ParameterSlice]) -> tuple[ParameterSlice, ...]:
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


def _split_layer(work: _Work, granularity: Granularity, tuners: set[str]) -> None:
    if granularity == "layer" or not work.free:
        work.whole(work.path, "layer", work.free)
        return
    if granularity == "adapter":
        work.adapters(tuners)
        work.whole(f"{work.path}.rest", "rest", work.free)
        return
    assert work.module is not None
    blocks = find_blocks(work.module)
    if granularity == "block":
        for block in _joined(blocks):
            owned = [name for name in work.free if block.owns(work.relative(name))]
            work.whole(f"{work.path}.{block.name}", cast("Kind", block.kind), owned)
    elif not is_transformer(blocks):
        work.adapters(tuners)
        for block in blocks:
            _split_plain(work, block)
    else:
        for block in blocks:
            _split_block(work, block, tuners)
        work.adapters(tuners)
        _refuse_unknown(work, work.free)
    # A layer that is a single module (a convolution, a Linear) has no part beside the rest: it is the component.
    alone = not blocks
    work.whole(work.path if alone else f"{work.path}.rest", "layer" if alone else "rest", work.free)


def _joined(blocks: list[Block]) -> list[Block]:
    """Blocks without those that lie inside another one (a shared expert inside its mixture)."""
    return [
        block
        for block in blocks
        if not any(other is not block and all(other.owns(f"{m}.") for m in block.members) for other in blocks)
    ]


def _split_plain(work: _Work, block: Block) -> None:
    owned = [name for name in work.free if block.owns(work.relative(name))]
    work.whole(f"{work.path}.{block.name}", cast("Kind", block.kind), owned)


def _split_block(work: _Work, block: Block, tuners: set[str]) -> None:
    """Heads, neuron blocks or experts of a block, then its PEFT modules, then its rest."""
    assert work.module is not None
    name = f"{work.path}.{block.name}"
    owned = [parameter for parameter in work.free if block.owns(work.relative(parameter))]
    if not owned:
        return
    if block.experts is not None:
        _split_experts(work, block)
    elif block.pattern is None:
        adapted = [parameter for parameter in owned if adapter_of(parameter, tuners) is None]
        _refuse_unknown(work, adapted)
    elif block.kind == "attention":
        work.ranges(f"{name}.head", "head", head_ranges(work.module, block.pattern, work.splitter.config))
    else:
        ranges = neuron_ranges(work.module, block.pattern, work.splitter.ffn_blocks)
        work.ranges(f"{name}.ffn_block", "ffn_block", ranges)
    work.adapters(tuners, within=block.owns)
    work.whole(f"{name}.rest", "rest", [n for n in work.free if block.owns(work.relative(n))])


def _split_experts(work: _Work, block: Block) -> None:
    """One component per expert (index of dimension 0 of fused parameters, or one child each) and one router."""
    pattern = block.experts
    assert pattern is not None
    assert work.module is not None
    experts = find(work.module, pattern.experts)
    assert experts is not None
    name = f"{work.path}.{block.name}"
    if isinstance(experts, nn.ModuleList):
        for index in range(len(experts)):
            prefix = join(work.path, pattern.experts, str(index))
            owned = [n for n in work.free if n.startswith(f"{prefix}.")]
            work.whole(f"{name}.expert.{index}", "expert", owned, index)
    else:
        fused = {join(pattern.experts, n): p for n, p in experts.named_parameters() if "lora_" not in n}
        counts = {parameter.shape[0] for parameter in fused.values()}
        if len(counts) != 1:
            raise PartitionError(
                f"expected fused parameters [experts, …] in {pattern.experts!r}, found "
                f"{ {n: tuple(p.shape) for n, p in fused.items()} }"
            )
        (count,) = counts
        groups = [[Range(parameter, 0, index, index + 1) for parameter in fused] for index in range(count)]
        work.ranges(f"{name}.expert", "expert", groups)
    routers = [n for n in work.free if any(work.relative(n).startswith(f"{r}.") for r in pattern.routers)]
    work.whole(f"{name}.router", "router", routers)


def _refuse_unknown(work: _Work, names: Iterable[str]) -> None:
    """Raises PartitionError when a matrix is left of which nobody knows what its rows are."""
    for name in names:
        module = module_at(work.splitter.model, name)
        matrix = len(work.splitter.shapes[work.splitter.canonical[name]]) >= 2
        if matrix and not isinstance(module, nn.Embedding):
            raise PartitionError(
                f"no known pattern says which rows and columns of {name!r} ({type(module).__name__}) are a head or "
                "neuron block"
            )
