"""What signals see of a forward pass: layer outputs, the attention context of each head, and the model's own output.

The context of a head is its slice of the input of the output projection: the columns of that projection that the head
owns say which. Nothing is changed but `requires_grad` flags, and those for the duration of the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgft.architectures.matrices import is_transposed, linear_size
from rgft.components import Component, ParameterSlice
from rgft.signals.base import Probe


@dataclass(frozen=True, kw_only=True)
class ContextSlice:
    """Columns start:stop of the input of one module."""

    module: str
    start: int
    stop: int


@dataclass(kw_only=True)
class Captured:
    """Tensors of one forward pass, in the order of the calls (a module may be called more than once).

    Attributes:
        layers: layer path → its outputs, each [B, T, D] or as the layer has it.
        contexts: path of an output projection → its inputs, each […, D].
        outputs: what the model returned.
        heads: component name → where its context is.
    """

    layers: dict[str, list[Tensor]] = field(default_factory=dict)
    contexts: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    heads: Mapping[str, tuple[ContextSlice, ...]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All captured activations."""
        return [t for group in (self.layers, self.contexts) for calls in group.values() for t in calls]


def input_dimension(module: nn.Module) -> int | None:
    """Dimension of the weight that the module's input meets: 1 in a Linear, 0 in a Conv1D; None in anything else."""
    if linear_size(module) is None:
        return None
    return 0 if is_transposed(module) else 1


def module_of(model: nn.Module, parameter: str) -> nn.Module:
    """The module that holds the parameter of that name."""
    return model.get_submodule(parameter.rpartition(".")[0])


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one of a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def head_contexts(probe: Probe) -> dict[str, tuple[ContextSlice, ...]]:
    """Where the context of each head is. Heads whose output projection is never called as a module are missing.

    `nn.MultiheadAttention` is such a case: it uses its projection's weight and never calls it.
    """
    found = {c.name: _context_of(probe.model, c) for c in probe.partition if c.kind == "head"}
    return {name: slices for name, slices in found.items() if slices}


def _context_of(model: nn.Module, head: Component) -> tuple[ContextSlice, ...]:
    weights = [part for part in head.slices if len(part.shape) == 2]
    columns = [part for part in weights if part.dim == input_dimension(module_of(model, part.parameter))]
    if not columns and weights and all(part.is_whole for part in weights):
        # The only head of its block owns whole weights; the output projection comes last.
        columns = [p for p in weights[-1:] if input_dimension(module_of(model, p.parameter)) is not None]
    return tuple(_context_slice(model, part) for part in columns)


def _context_slice(model: nn.Module, part: ParameterSlice) -> ContextSlice:
    path = part.parameter.rpartition(".")[0]
    size = part.shape[input_dimension(model.get_submodule(path)) or 0]
    return ContextSlice(module=path, start=part.start, stop=size if part.is_whole else part.stop)


@contextmanager
def capture(probe: Probe, *, gradients: bool) -> Iterator[Captured]:
    """Records activations of whatever forward passes run inside.

    With `gradients` every recorded tensor can be differentiated with respect to, while no parameter can: backward
    passes make dX only, and none below the lowest recorded tensor. Differentiate inside the context.
    """
    seen = Captured(heads=head_contexts(probe))
    recording = True

    def record(store: dict[str, list[Tensor]], path: str, value: Any) -> None:
        tensor = first_tensor(value)
        if not recording or tensor is None or not tensor.is_floating_point():
            return
        if gradients and not tensor.requires_grad:
            tensor.requires_grad_()
        store.setdefault(path, []).append(tensor)

    def output_hook(path: str) -> Callable[..., None]:
        return lambda module, args, output: record(seen.layers, path, output)

    def input_hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: record(seen.contexts, path, args or tuple(kwargs.values()))

    def root_hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(output)

    handles = [probe.model.register_forward_hook(root_hook)]
    for path in probe.partition.layers:
        handles.append(probe.model.get_submodule(path).register_forward_hook(output_hook(path)))
    for path in sorted({piece.module for slices in seen.heads.values() for piece in slices}):
        module = probe.model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(input_hook(path), with_kwargs=True))
    flags = _flags(probe) if gradients else []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        # Without a parameter that requires gradients, nn.TransformerEncoder takes a path that has no derivative.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.set_grad_enabled(gradients):
            yield seen
    finally:
        recording = False
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
        for handle in handles:
            handle.remove()


def _flags(probe: Probe) -> list[tuple[Tensor, bool]]:
    tensors = {id(t): t for parts in probe.parameters.values() for t in parts}
    tensors.update({id(p): p for p in probe.model.parameters()})
    return [(tensor, True) for tensor in tensors.values() if tensor.requires_grad]


def unit_scores(
    probe: Probe, seen: Captured, score: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor | None]
) -> dict[str, Tensor]:
    """Scores of captured units, given to the components they stand for.

    `score(tensor, cut)` scores a captured tensor seen through `cut`, which narrows a tensor of its shape to the unit
    (a head's columns, or everything); None means no information. Calls of one unit add up.

    A head gets the score of its context, every other component of a layer that of the layer's output. Components
    outside the layers and heads whose context cannot be seen are left out.
    """

    def total(tensors: list[Tensor], cut: Callable[[Tensor], Tensor]) -> Tensor | None:
        terms = [term for tensor in tensors if (term := score(tensor, cut)) is not None]
        return torch.stack(terms).sum() if terms else None

    layers = {path: total(tensors, lambda t: t) for path, tensors in seen.layers.items()}
    scores: dict[str, Tensor] = {}
    for component in probe.partition:
        if component.kind != "head":
            value = layers.get(component.layer) if component.layer is not None else None
        else:
            pieces = [
                total(
                    seen.contexts.get(piece.module, []),
                    lambda t, piece=piece: t.narrow(-1, piece.start, piece.stop - piece.start),
                )
                for piece in seen.heads.get(component.name, ())
            ]
            known = [piece for piece in pieces if piece is not None]
            value = torch.stack(known).sum() if known else None
        if value is not None:
            scores[component.name] = value
    return scores


def as_floats(scores: dict[str, Tensor]) -> dict[str, float]:
    """Moves all scores to the host at once."""
    return dict(zip(scores, torch.stack(list(scores.values())).tolist(), strict=True)) if scores else {}
