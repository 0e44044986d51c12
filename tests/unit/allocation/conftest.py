"""Situations made of a few components, with or without a map, and a transparent cost model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from rgft.allocation.base import Situation
from rgft.components import Component, ParameterSlice
from rgft.error_map import ErrorMap


@dataclass(frozen=True)
class Cost:
    forward: float
    dx: float
    dw: float
    pairs: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.dx + self.dw


class ChainCosts:
    """F fixed; dX grows with every depth that is reached; dW is a component's own."""

    def __init__(self, components: tuple[Component, ...], dw: Mapping[str, float], dx: float = 10.0) -> None:
        self.depths = {c.name: c.depth for c in components}
        self.top = max(self.depths.values())
        self.dw, self.dx, self.calls = dw, dx, 0

    def step_flops(self, active: Collection[str], *, rows: int, tokens: int) -> Cost:
        self.calls += 1
        scale = float(rows * tokens)
        reached = self.top - min(self.depths[name] for name in active)
        return Cost(scale * 100.0, scale * self.dx * reached, scale * sum(self.dw[name] for name in active))


def component(name: str, depth: int, *, kind: Any = "head", layer: str | None = None, dims: int = 2) -> Component:
    part = ParameterSlice(parameter=f"{name}.weight", shape=(4,) * dims)
    return Component(name=name, kind=kind, slices=(part,), depth=depth, layer=layer)


def model(layers: int = 4, heads: int = 2) -> tuple[Component, ...]:
    """An embedding, `layers` layers of `heads` heads, an FFN block and a vector-only rest, and a classifier."""
    parts = [component("embeddings", 0, kind="embedding")]
    for layer in range(layers):
        path = f"layers.{layer}"
        parts += [component(f"{path}.head.{h}", layer + 1, layer=path) for h in range(heads)]
        parts.append(component(f"{path}.ffn", layer + 1, kind="ffn_block", layer=path))
        parts.append(component(f"{path}.rest", layer + 1, kind="rest", layer=path, dims=1))
    return (*parts, component("classifier", layers + 1, kind="classifier"))


def observed(components: tuple[Component, ...], scores: Mapping[str, float] | list[float]) -> ErrorMap:
    """A map whose Ê_k is the score itself, up to rounding."""
    table = scores if isinstance(scores, Mapping) else dict(zip((c.name for c in components), scores, strict=True))
    names = [c.name for c in components]
    return ErrorMap.empty(names, beta=0.0).observe(dict(table), step=0) if table else ErrorMap.empty(names)


@dataclass(frozen=True)
class Make:
    model: Callable[..., tuple[Component, ...]]
    component: Callable[..., Component]
    map: Callable[..., ErrorMap]
    costs: Callable[..., Any]

    def flat(self, count: int) -> tuple[Component, ...]:
        """`count` components, one per depth."""
        return tuple(component(f"c{i}", i, layer=f"layers.{i}") for i in range(count))

    def situation(
        self, components: tuple[Component, ...], scores: Mapping[str, float] | list[float] | None = None, **more: Any
    ) -> Situation:
        settings = {"step": 1, **more}
        return Situation(components=components, error_map=observed(components, scores or {}), **settings)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make(model=model, component=component, map=observed, costs=ChainCosts)
