"""IST: layers sampled by importance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.random import generator
from rgft.allocation.selection import (
    OUTSIDE,
    SelectionPolicy,
    beside_layers,
    by_layer,
    observed_scores,
    require_choice,
    require_fraction,
    share_of,
)
from rgft.allocation.turns import require_stretch, turn


@dataclass(frozen=True, kw_only=True)
class IST(SelectionPolicy):
    """A share of the layers, sampled without replacement with probabilities that follow their importance.

    Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of
    Large Language Models", Findings of EMNLP 2024 (arXiv:2410.11772). A layer's importance is the mean score of its
    components (signal `suppression`, which measures the loss change when the layer's adapter is scaled down); a mixture
    with the uniform distribution keeps every layer reachable. Layers that were not looked at yet count as the mean of
    the others, so that the first draws, before any look, are uniform, as they are there. Made for PEFT modules, one
    group per layer; what lies before the layers stays off, as embeddings do there. Its code draws at every step, and
    looks every 10 steps. Outside a plan: its three extra forward passes are its signal's.

    Attributes:
        fraction: share of layers on.
        uniform: weight of the uniform distribution, in (0, 1].
        every: steps between draws, or a share of the run.
        outside: what trains beside them: `"after"`: what runs after the layers; `"all"`: embeddings, too.
    """

    name: ClassVar[str] = "ist"
    decides_every_step: ClassVar[bool] = True
    fraction: float = 0.25
    uniform: float = 0.1
    every: float = 1
    outside: str = "after"

    def __post_init__(self) -> None:
        require_fraction("policy.fraction", self.fraction)
        require_fraction("policy.uniform", self.uniform)
        require_stretch("policy.every", self.every)
        require_choice("policy.outside", self.outside, OUTSIDE)

    def active(self, situation: Situation) -> frozenset[str]:
        layers = by_layer(situation.components)
        importance = self.importance(situation)
        total = sum(importance.values())
        rng = generator(situation.seed, turn("policy.every", self.every, situation), self.name)
        keys: dict[str, float] = {}
        for layer, value in importance.items():
            share = value / total if total > 0.0 else 1.0 / len(layers)
            weight = (1.0 - self.uniform) * share + self.uniform / len(layers)
            # Efraimidis & Spirakis 2006: the n smallest −ln(u)/w are a weighted sample without replacement.
            keys[layer] = -math.log(1.0 - rng.random()) / weight
        drawn = sorted(keys, key=keys.__getitem__)[: share_of(self.fraction, len(keys))]
        chosen = {component.name for layer in drawn for component in layers[layer]}
        return beside_layers(situation.components, self.outside) | chosen

    def importance(self, situation: Situation) -> dict[str, float]:
        """Per layer, at least 0."""
        scores = observed_scores(situation)
        known = {
            layer: max(0.0, fmean(found))
            for layer, members in by_layer(situation.components).items()
            if (found := [scores[c.name] for c in members if c.name in scores])
        }
        unknown = fmean(known.values()) if known else 0.0
        return {layer: known.get(layer, unknown) for layer in by_layer(situation.components)}
