"""What is timed: one cell is one way of making a training step, on one workload."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rgft.allocation.selection import by_layer
from rgft.components import Component, Partition
from rgft.plan import UpdatePlan

Kind = Literal["full", "lora", "lora_top", "frozen", "rgft"]


@dataclass(frozen=True, kw_only=True)
class EngineCell:
    """One way of making a step.

    Attributes:
        kind: "full" and "frozen" (requires_grad off below the cut, by hand) are plain loops; "lora" is PEFT's,
            "lora_top" that on what lies above the cut only; "rgft" runs through the guide.
        frozen_fraction: share of layers below the cut.
        dw: share of the weight gradients above the cut that are computed.
        granularity: what is on or off above the cut: whole layers, or heads and neuron blocks.
        cache: whether the frozen prefix is read from the activation cache (its steps are those of later epochs).
        low_rank: rank of the pairs by which layers are trained in place of dW, and nothing else of them; 0: dense.
    """

    kind: Kind
    frozen_fraction: float = 0.0
    dw: float = 1.0
    granularity: Literal["layer", "head"] = "layer"
    cache: bool = False
    low_rank: int = 0

    @property
    def name(self) -> str:
        if self.kind in ("full", "lora"):
            return self.kind
        parts = [self.kind, f"frozen{round(100 * self.frozen_fraction)}"]
        if self.kind == "rgft":
            parts += [f"dw{round(100 * self.dw)}", self.granularity, "cache" if self.cache else "nocache"]
            parts += [f"rank{self.low_rank}"] if self.low_rank else []
        return "-".join(parts)


def all_cells() -> Iterator[EngineCell]:
    """Baselines, then RGFT at every frozen fraction × share of dW × granularity × cache."""
    yield EngineCell(kind="full")
    yield EngineCell(kind="rgft")
    yield EngineCell(kind="lora")
    yield EngineCell(kind="lora_top", frozen_fraction=0.5)
    yield EngineCell(kind="frozen", frozen_fraction=0.5)
    for frozen in (0.25, 0.5, 0.75):
        for cache in (False, True):
            for granularity in ("layer", "head"):
                for dw in (1.0, 0.5, 0.25):
                    yield EngineCell(kind="rgft", frozen_fraction=frozen, dw=dw, granularity=granularity, cache=cache)
    for cache in (False, True):
        yield EngineCell(kind="rgft", frozen_fraction=0.5, cache=cache, low_rank=8)


def few_cells() -> Iterator[EngineCell]:
    """The eight that say most, for workloads whose steps are slow."""
    yield EngineCell(kind="full")
    yield EngineCell(kind="lora")
    yield EngineCell(kind="frozen", frozen_fraction=0.5)
    yield EngineCell(kind="rgft", frozen_fraction=0.5)
    yield EngineCell(kind="rgft", frozen_fraction=0.5, cache=True)
    yield EngineCell(kind="rgft", frozen_fraction=0.5, dw=0.5, granularity="head", cache=True)
    for cache in (False, True):
        yield EngineCell(kind="rgft", frozen_fraction=0.5, cache=cache, low_rank=8)


def cut_at(components: Sequence[Component], frozen_fraction: float) -> int:
    """Depth of the cut that freezes this share of the layers."""
    layers = sorted({component.depth for component in components if component.layer is not None})
    frozen = round(frozen_fraction * len(layers))
    return layers[frozen] if 0 < frozen < len(layers) else 0


def plan_of(cell: EngineCell, partition: Partition, *, seed: int = 0) -> UpdatePlan:
    """The cell's plan.

    Above the cut a share `dw` of each layer's components is on, drawn at random as a map would scatter them; at
    granularity "layer" that share of the layers. The lowest layer above the cut is always among them, so that all
    plans with one cut run backward equally deep. What runs after the layers is on.
    """
    components = partition.components
    cut = cut_at(components, cell.frozen_fraction)
    on = {c.name for c in components if c.depth >= cut}
    layers = [members for members in by_layer(components).values() if members[0].depth >= max(cut, 1)]
    if cell.dw < 1.0:
        draw = random.Random(seed)
        if cell.granularity == "layer":
            others = draw.sample(layers[1:], max(0, round(cell.dw * len(layers)) - 1))
            kept = [layers[0], *others]
            on -= {c.name for members in layers if members not in kept for c in members}
        else:
            for members in layers:
                on -= {c.name for c in draw.sample(list(members), len(members) - round(cell.dw * len(members)))}
    multipliers = {component.name: float(component.name in on) for component in components}
    return UpdatePlan(step=0, multipliers=multipliers, cut=cut, reason=cell.name)
