"""IST: layers sampled by importance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.random import generator
from rgft.allocation.selection import (
    SelectionPolicy,
    by_layer,
    observed_scores,
    outside_layers,
    require_fraction,
    share_of,
    unobserved,
)


@dataclass(frozen=True, kw_only=True)
class IST(SelectionPolicy):
    """A share of the layers, sampled without replacement with probabilities that follow their importance.

    Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of
    Large Language Models", Findings of EMNLP 2024 (arXiv:2410.11772). A layer's importance is the mean score of its
    components (signal `suppression`, which measures the loss change when the layer's adapter is scaled down); a mixture
    with the uniform distribution keeps every layer reachable. Made for PEFT modules, one group per layer. Outside the
    layers all is on. Sampled anew at each decision. Outside a plan: IST's three extra forward passes are its signal's.

    Attributes:
        fraction: share of layers on.
        uniform: weight of the uniform distribution, in (0, 1].
    """

    name: ClassVar[str] = "ist"
    fraction: float = 0.25
    uniform: float = 0.1

    def __post_init__(self) -> None:
        require_fraction("policy.fraction", self.fraction)
        require_fraction("policy.uniform", self.uniform)

    def active(self, situation: Situation) -> frozenset[str]:
        scores = observed_scores(situation)
        groups = {
            layer: [c.name for c in members if c.name in scores]
            for layer, members in by_layer(situation.components).items()
        }
        groups = {layer: names for layer, names in groups.items() if names}
        importance = {
            layer: max(0.0, sum(scores[name] for name in names) / len(names)) for layer, names in groups.items()
        }
        total = sum(importance.values())
        rng = generator(situation.seed, situation.step, self.name)
        keys: dict[str, float] = {}
        for layer, value in importance.items():
            share = value / total if total > 0.0 else 1.0 / len(groups)
            weight = (1.0 - self.uniform) * share + self.uniform / len(groups)
            # Efraimidis & Spirakis 2006: the n smallest −ln(u)/w are a weighted sample without replacement.
            keys[layer] = -math.log(1.0 - rng.random()) / weight
        drawn = sorted(keys, key=keys.__getitem__)[: share_of(self.fraction, len(keys))]
        chosen = frozenset(name for layer in drawn for name in groups[layer])
        return chosen | unobserved(situation) | outside_layers(situation.components)
