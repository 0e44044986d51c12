"""Where a model's layers are, and what lies outside them, found by structure.

A layer stack is a `ModuleList` or `Sequential` of same-typed children that have children of their own. Several stacks
(T5's encoder and decoder) follow each other in registration order; stages of a convolutional network are opened, so
that its residual blocks are the layers. A model without a stack has its parametered children, in registration order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from rgft.architectures.matrices import has_matrix, matrix_size
from rgft.architectures.patterns import (
    ATTENTION,
    CLASSIFIERS,
    LM_HEADS,
    LM_HEADS_OR_CLASSIFIERS,
    RUNS_AFTER_LAYERS,
    RUNS_BEFORE_LAYERS,
    matches,
)

_CONTAINERS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that follow each other: `container` is the path that holds layers `first` to `stop`−1."""

    container: str
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A module (or a single parameter of an enclosing module) outside the layers.

    Attributes:
        path: its path.
        depth: number of layers that run before it; number of layers + 1 for what runs after them all.
        kind: embedding, norm, classifier, lm_head, conv_block or other. Poolers count as part of the classifier.
    """

    path: str
    depth: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Layers in forward order and all that lies outside; together they hold every parameter."""

    layers: tuple[str, ...]
    outside: tuple[Outside, ...]

    @cached_property
    def _depths(self) -> dict[str, int]:
        table = {unit.path: unit.depth for unit in self.outside}
        table.update({path: position + 1 for position, path in enumerate(self.layers)})
        return table

    def place(self, parameter: str) -> tuple[str, int]:
        """Path of the layer or outside unit that holds the parameter, and its depth; paths are compared whole."""
        segments = parameter.split(".")
        for length in range(len(segments), -1, -1):
            path = ".".join(segments[:length])
            if path in self._depths:
                return path, self._depths[path]
        raise KeyError(parameter)


def join(*names: str) -> str:
    """A module path from its non-empty parts."""
    return ".".join(name for name in names if name)


def parametered(module: nn.Module) -> dict[str, nn.Module]:
    """Children that hold parameters, by name."""
    return {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation: by type, or by name with nothing but vectors inside."""
    if isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    return "norm" in type(module).__name__.lower() and all(p.dim() <= 1 for p in module.parameters())


def find_structure(model: nn.Module) -> Structure:
    """Finds layers and the units outside them, with the depth and kind of each."""
    stacks: list[tuple[str, list[str]]] = []
    _visit("", model, stacks, set())
    stacks = stacks or _by_children(model)
    layers = [path for _, paths in stacks for path in paths]
    ranges, first = [], 0
    for container, paths in stacks:
        ranges.append(Stack(container=container, first=first, stop=first + len(paths)))
        first += len(paths)
    position = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    opened = {join(*path.split(".")[:length]) for path in layers for length in range(path.count(".") + 1)} | {""}
    tables = (
        module for path, module in model.named_modules() if isinstance(module, nn.Embedding) and "pos" not in path
    )
    vocabulary = max((table.num_embeddings for table in tables), default=0)
    outside: list[Outside] = []
    for path, module in _units(model, opened, set(layers)):
        is_module = path in position
        holder = path if is_module else path.rpartition(".")[0]
        before = sum(position[layer] < position[holder] for layer in layers)
        depth = _depth(path, module, before, ranges, len(layers), is_module=is_module)
        kind = _kind(path, module, depth, len(layers), vocabulary=vocabulary)
        outside.append(Outside(path=path, depth=depth, kind=kind))
    if not any(unit.kind in ("classifier", "lm_head") for unit in outside):
        _name_classifier(model, outside, depth=len(layers) + 1)
    return Structure(layers=tuple(layers), outside=tuple(outside))


def _name_classifier(model: nn.Module, outside: list[Outside], *, depth: int) -> None:
    """Whatever its name: the last part after the layers with a linear layer of its own is what makes the outputs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tables = {id(p) for m in modules.values() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for index in reversed(range(len(outside))):
        unit = outside[index]
        if unit.depth != depth or unit.kind != "other" or unit.path not in modules:
            continue
        linear = [m for m in modules[unit.path].modules() if isinstance(m, nn.Linear)]
        if linear and not any(id(p) in tables for m in linear for p in m.parameters()):
            outside[index] = replace(unit, kind="classifier")
            return


def _visit(path: str, module: nn.Module, stacks: list[tuple[str, list[str]]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, _CONTAINERS) and _is_stack(module):
        stacks.append((path, _opened(path, module)))
        return
    for name, child in module.named_children():
        _visit(join(path, name), child, stacks, seen)


def _is_stack(container: nn.Module) -> bool:
    children = list(parametered(container).values())
    known = [child for child in children if next(matches(child, ATTENTION), None) is not None]
    if len(children) < 2 or len({type(child) for child in children}) > 1:
        # One layer alone, or layers of several types (hybrid decoders), count when their attention is known.
        same_depth = len(children) == 1 or (isinstance(container, nn.ModuleList) and len(known) >= 2)
        return bool(known) and same_depth
    return all(parametered(child) for child in children)


def _opened(path: str, container: nn.Module) -> list[str]:
    """Paths of the layers of a stack; a stack of stages gives the stages' blocks."""
    children = parametered(container)
    inner = [_stage_blocks(child) for child in children.values()]
    paths = []
    for name, blocks in zip(children, inner, strict=True):
        opened = blocks if all(inner) else [""]
        paths.extend(join(path, name, block) for block in opened)
    return paths


def _stage_blocks(stage: nn.Module) -> list[str]:
    """Blocks of a stage that is nothing but a container of composite children; empty when it is no such stage."""
    below, prefix = stage, ""
    if not isinstance(stage, _CONTAINERS):
        inside = parametered(stage)
        if "stage" not in type(stage).__name__.lower() or len(inside) != 1 or stage._parameters:
            return []
        ((prefix, below),) = inside.items()
    blocks = parametered(below)
    if not isinstance(below, _CONTAINERS) or not all(parametered(block) for block in blocks.values()):
        return []
    return [join(prefix, name) for name in blocks]


def _by_children(model: nn.Module) -> list[tuple[str, list[str]]]:
    path, module = "", model
    while len(children := parametered(module)) == 1 and not any(True for _ in module.parameters(recurse=False)):
        ((name, module),) = children.items()
        path = join(path, name)
    if not children:
        return [("", [path])] if path else []

    def opened(path: str, module: nn.Module) -> list[str]:
        layers: list[str] = []
        for name, child in parametered(module).items():
            if isinstance(child, _CONTAINERS):
                layers.extend(opened(join(path, name), child))
            elif not isinstance(child, nn.Embedding):
                layers.append(join(path, name))
        return layers

    layers = opened(path, module)
    return [(path, layers)] if layers else []


def _units(model: nn.Module, opened: set[str], layers: set[str]) -> list[tuple[str, nn.Module]]:
    """Outermost modules beside the way from the root to the layers, and the parameters that lie on that way."""
    units: list[tuple[str, nn.Module]] = []

    def walk(path: str, module: nn.Module) -> None:
        units.extend((join(path, name), module) for name, p in module._parameters.items() if p is not None)
        for name, child in module._modules.items():
            below = join(path, name)
            if child is None or below in layers or next(child.parameters(), None) is None:
                continue
            if below in opened:
                walk(below, child)
            else:
                units.append((below, child))

    walk("", model)
    return units


def _depth(path: str, module: nn.Module, before: int, stacks: list[Stack], layers: int, *, is_module: bool) -> int:
    """Registration order says what runs first, except for embeddings, final norms and heads: their names do."""

    def shared(stack: Stack) -> int:
        pairs = zip(path.split("."), stack.container.split("."), strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(path.count("."), stack.container.count(".")) + 1
        )

    nearest = [stack for stack in stacks if shared(stack) == max(map(shared, stacks))]
    last = path.rpartition(".")[2]
    if nearest and is_module and last in RUNS_AFTER_LAYERS + LM_HEADS + LM_HEADS_OR_CLASSIFIERS:
        before = max(stack.stop for stack in nearest)
    elif nearest and _runs_before(path, module):
        before = min(stack.first for stack in nearest)
    return layers + 1 if before == layers and layers else before


def _runs_before(path: str, module: nn.Module) -> bool:
    if any(path == end or path.endswith(f".{end}") for end in RUNS_BEFORE_LAYERS):
        return True
    names = path.lower().split(".")
    return isinstance(module, nn.Embedding) or "prompt_encoder" in names or "embed" in names[-1]


def _kind(path: str, module: nn.Module, depth: int, layers: int, *, vocabulary: int) -> str:
    last = path.rpartition(".")[2]
    if depth == 0 and layers:
        return "embedding"
    if last in LM_HEADS:
        return "lm_head"
    if last in LM_HEADS_OR_CLASSIFIERS:
        outputs = {matrix_size(inner)[1] for inner in module.modules() if has_matrix(inner)}
        return "lm_head" if vocabulary in outputs else "classifier"
    if last.lstrip("_") in CLASSIFIERS:
        return "classifier"
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding) or "embed" in last:
        return "embedding"
    return "conv_block" if isinstance(module, _ConvNd) else "other"
