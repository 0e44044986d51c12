"""How far training went from the initial weights, by component."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.components import Partition
from rgft.partition import partition


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with, by their names in the plain model: PEFT's adapters merged, in a copy.

    Parameters of adapters that cannot be merged (bottlenecks) stand beside, under names of their own.
    """
    is_peft = hasattr(model, "merge_adapter")
    plain = _merged(model) if is_peft else model
    adapted = tuple(f"{name}." for name, module in plain.named_modules() if is_peft and hasattr(module, "base_layer"))
    found: dict[str, Tensor] = {}
    for name, parameter in plain.named_parameters():
        parts = name.split(".")
        is_merged = name.startswith(adapted) and "base_layer" not in parts
        if is_merged or "original_module" in parts:  # the latter is what a trained copy replaces
            continue
        for wrapper in ("base_layer", "modules_to_save"):
            if wrapper in parts:
                place = parts.index(wrapper)
                del parts[place : place + (1 if wrapper == "base_layer" else 2)]  # the adapter's name follows
        found[".".join(parts)] = parameter.detach()
    return found


def _merged(model: Any) -> nn.Module:
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    return merged.base_model.model


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Weights and components of a plain model before training.

    Attributes:
        weights: name → a copy.
        components: at layer granularity.
    """

    weights: Mapping[str, Tensor]
    components: Partition

    @classmethod
    def of(cls, model: nn.Module) -> StartingPoint:
        """Takes a copy. Take it before a method wraps or freezes the model."""
        return cls(
            weights={name: p.detach().cpu().clone() for name, p in model.named_parameters()},
            components=partition(model),
        )

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """Cosine between trained and initial weights, and how large the change is.

        Adapters are merged first, so that methods that train pairs are comparable with those that train weights.

        Args:
            model: trained, without a guide.

        Returns:
            `overall` and `components`: name → `cosine` (⟨θ, θ_0⟩ / ‖θ‖‖θ_0‖; None and a `reason` where one of them is
            zero) and `relative_change` (‖θ − θ_0‖ / ‖θ_0‖; None where θ_0 is zero); `new_parameters`: number of those
            that the initial model does not have.
        """
        trained = effective_weights(model)
        sums = {component.name: self._sums(component.slices, trained) for component in self.components}
        total = torch.stack(list(sums.values())).sum(0)
        new = [p.numel() for name, p in trained.items() if name not in self.weights]
        return {
            "overall": _figures(total),
            "components": {name: _figures(values) for name, values in sums.items()},
            "new_parameters": sum(new),
        }

    def _sums(self, slices: Any, trained: Mapping[str, Tensor]) -> Tensor:
        """⟨θ, θ_0⟩, ‖θ‖², ‖θ_0‖², ‖θ − θ_0‖² in float64: a change of 1e-4 is a cosine of 1 − 5e-9."""
        sums = torch.zeros(4, dtype=torch.float64)
        for part in slices:
            start = part.of(self.weights[part.parameter]).double()
            now = part.of(trained[part.parameter].cpu()).double()
            sums += torch.stack(
                [(start * now).sum(), now.square().sum(), start.square().sum(), (now - start).square().sum()]
            )
        return sums


def _figures(sums: Tensor) -> dict[str, Any]:
    product, now, start, change = sums.tolist()
    if not (now > 0.0 and start > 0.0):
        return {
            "cosine": None, "relative_change": (change / start) ** 0.5 if start > 0.0 else None,
            "reason": "the initial weights are zero" if start == 0.0 else "the trained weights are zero",
        }  # fmt: skip
    return {"cosine": product / (now * start) ** 0.5, "relative_change": (change / start) ** 0.5}
