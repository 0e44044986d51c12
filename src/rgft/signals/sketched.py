"""Scoring components by sketches: linear weights without their dW, everything else exactly.

What an off component would do can so be seen at the cost of dX and a few matrix–vector products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice
from rgft.errors import ConfigError
from rgft.signals.base import GradientSignal, Parts, Probe
from rgft.signals.captures import input_dimension
from rgft.signals.sketch import LinearSketch, Side, estimate


@dataclass(frozen=True, kw_only=True)
class SketchedScores:
    """Scores by component, and their standard errors where a sketch had a part in them.

    The error of a score that is a function of the estimated sum (a root) is half the difference of the score at plus
    and minus one standard error of the sum. The estimates of components that share a module share its signs: each is
    unbiased, and they are correlated.
    """

    scores: dict[str, float]
    standard_errors: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A slice of a component that is estimated from the sketch of a module."""

    component: Component
    index: int
    slice: ParameterSlice
    module: str


def sketched_measure(probe: Probe, signal: GradientSignal, *, signs: int = 8, seed: int = 0) -> SketchedScores:
    """Scores all components of the probe as `signal.measure` does, linear weights by sketches.

    Weights of Linear-like modules (Linear, Conv1D) do not require gradients meanwhile, so that the backward pass
    computes dX only; biases, norms, embeddings, convolutions and weights shared between modules are scored exactly. A
    module that no gradient reaches is left out, as in `measure`.

    Args:
        probe: as for `measure`.
        signal: one whose `sketchable` says how.
        signs: m, sign vectors per module; fewer than 8 are very noisy for near-rank-one gradients.
        seed: of the signs, together with the probe's step.

    Raises:
        ConfigError: the signal is no squared norm and no inner product of the gradient, or `signs` < 1.
    """
    form = signal.sketchable
    if form is None or signs < 1:
        raise ConfigError(
            f"sketches need signs >= 1 and a signal that is a sum of g² or −⟨g, Δθ⟩ (grad_norm with p=2, fisher, "
            f"predicted_decrease, generalising_decrease); found signs={signs} and {signal.name!r}"
        )
    signal.check(probe)
    updates: dict[str, Parts | None] = {}
    if form == "decrease" and probe.update is not None:
        updates = {component.name: probe.update(component.name) for component in probe.partition}
    pieces = [p for p in _pieces(probe) if form != "decrease" or updates[p.component.name] is not None]
    sketches = _sketches(probe.model, pieces, signs, torch.Generator().manual_seed(seed * 1_000_003 + probe.step))
    with _watching(probe, pieces, sketches):
        exact = signal.stream(probe)
    draws: dict[str, list[Tensor]] = {}
    for piece in pieces:
        sketch = sketches[piece.module, _side(probe.model, piece)]
        if sketch.is_empty:
            continue
        bounds = () if piece.slice.is_whole else (piece.slice.start, piece.slice.stop)
        if form == "squared_norm":
            drawn = sketch.squared_norm(*bounds)
        else:
            steps = updates[piece.component.name]
            assert steps is not None
            drawn = -sketch.inner_product(steps[piece.index], *bounds)
        draws.setdefault(piece.component.name, []).append(drawn)
    return _scores(probe, signal, exact, draws)


def _scores(
    probe: Probe, signal: GradientSignal, exact: dict[str, list[Tensor]], draws: dict[str, list[Tensor]]
) -> SketchedScores:
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for component in probe.partition:
        name = component.name
        known = float(torch.stack(exact[name]).sum()) if name in exact else 0.0
        if name in draws:
            # Draw j of every module is independent of draw i: summed first, they show the sum's error.
            total = estimate(torch.stack([drawn.double() for drawn in draws[name]]).sum(0))
            scores[name] = signal.finish(known + total.value, component)
            errors[name] = _propagated(signal, component, known + total.value, total.standard_error)
        elif name in exact:
            scores[name] = signal.finish(known, component)
    return SketchedScores(scores=scores, standard_errors=errors)


def _propagated(signal: GradientSignal, component: Component, total: float, error: float) -> float:
    if math.isnan(error):
        return error
    low = max(0.0, total - error) if signal.sketchable == "squared_norm" else total - error
    return abs(signal.finish(total + error, component) - signal.finish(low, component)) / 2.0


def _pieces(probe: Probe) -> list[_Piece]:
    """The slices that a sketch can stand for."""
    modules = dict(probe.model.named_modules())
    holders: dict[int, int] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    pieces = []
    for component in probe.partition:
        for index, part in enumerate(component.slices):
            path, _, name = part.parameter.rpartition(".")
            module = modules.get(path)
            if (
                name == "weight"
                and module is not None
                and len(part.shape) == 2
                and input_dimension(module) is not None
                # nn.MultiheadAttention never calls its output projection.
                and not isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
                and holders.get(id(probe.parameters[component.name][index]), 1) == 1
            ):
                pieces.append(_Piece(component=component, index=index, slice=part, module=path))
    return pieces


def _side(model: nn.Module, piece: _Piece) -> Side:
    in_dimension = input_dimension(model.get_submodule(piece.module))
    return "output" if piece.slice.dim is not None and piece.slice.dim == in_dimension else "input"


def _sketches(
    model: nn.Module, pieces: list[_Piece], signs: int, generator: torch.Generator
) -> dict[tuple[str, Side], LinearSketch]:
    sketches: dict[tuple[str, Side], LinearSketch] = {}
    for piece in pieces:
        key = piece.module, _side(model, piece)
        if key not in sketches:
            transposed = input_dimension(model.get_submodule(piece.module)) == 0
            outputs, inputs = piece.slice.shape[::-1] if transposed else piece.slice.shape
            sketches[key] = LinearSketch(
                inputs=inputs, outputs=outputs, signs=signs, side=key[1], generator=generator, transposed=transposed
            )
    return sketches


@contextmanager
def _watching(probe: Probe, pieces: list[_Piece], sketches: dict[tuple[str, Side], LinearSketch]) -> Iterator[None]:
    """Inside, the pieces require no gradients and every call of their modules is added to the sketches."""
    by_module: dict[str, list[LinearSketch]] = {}
    for (path, _), sketch in sketches.items():
        by_module.setdefault(path, []).append(sketch)

    def hook(watchers: list[LinearSketch]) -> Callable[..., Tensor]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            kept = [sketch.keep(args[0]) for sketch in watchers]

            def add(dy: Tensor) -> None:
                for sketch, x in zip(watchers, kept, strict=True):
                    sketch.add(x, dy)

            if output.requires_grad:
                output.register_hook(add)
                return output
            # Nothing below requires gradients. A clone, because what follows may work in place on it.
            leaf = output.detach().requires_grad_()
            leaf.register_hook(add)
            return leaf.clone()

        return watch

    parameters = [probe.parameters[piece.component.name][piece.index] for piece in pieces]
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    handles = [
        probe.model.get_submodule(path).register_forward_hook(hook(watchers)) for path, watchers in by_module.items()
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
