"""Plans fixed in advance: everything, the last layers, the head, norms and biases, decay by depth, a given plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from rgft.allocation.base import Policy, Situation
from rgft.allocation.peers.freezing import above_layer
from rgft.allocation.selection import SelectionPolicy, by_layer, make_plan, matching, require_at_least
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


@dataclass(frozen=True, kw_only=True)
class AllOn(SelectionPolicy):
    """Full fine-tuning: everything on at multiplier 1."""

    name: ClassVar[str] = "all_on"
    needs_map: ClassVar[bool] = False

    def active(self, situation: Situation) -> frozenset[str]:
        return frozenset(component.name for component in situation.components)


@dataclass(frozen=True, kw_only=True)
class LastN(SelectionPolicy):
    """The last n layers and what runs after them.

    Attributes:
        layers: n ≥ 1, at most the number of layers; with all of them, what lies before the layers is on too.
    """

    name: ClassVar[str] = "last_n"
    needs_map: ClassVar[bool] = False
    layers: int = 1

    def __post_init__(self) -> None:
        require_at_least("policy.layers", self.layers, 1)

    def active(self, situation: Situation) -> frozenset[str]:
        count = len(by_layer(situation.components))
        if self.layers > count:
            raise ConfigError(f"policy.layers: expected at most the model's {count} layers, found {self.layers}")
        return above_layer(situation.components, count - self.layers)


@dataclass(frozen=True, kw_only=True)
class LinearProbe(SelectionPolicy):
    """The classifier or LM head alone, on frozen features.

    Attributes:
        kinds: kinds or names that count as the head.
    """

    name: ClassVar[str] = "linear_probe"
    needs_map: ClassVar[bool] = False
    kinds: tuple[str, ...] = ("classifier", "lm_head")

    def active(self, situation: Situation) -> frozenset[str]:
        head = matching(situation.components, self.kinds, setting="policy.kinds")
        if not head:
            kinds = sorted({component.kind for component in situation.components})
            raise ConfigError(
                f"policy.kinds: expected a component of kind or name {', '.join(self.kinds)}, found only {kinds}; a "
                "tied LM head belongs to the embedding; name the component to train"
            )
        return head


@dataclass(frozen=True, kw_only=True)
class NormsOrBiasOnly(SelectionPolicy):
    """Norms and biases only, as far as they are components of their own, with the head.

    Ben Zaken et al., "BitFit", ACL 2022 (arXiv:2106.10199) trains every bias. A component is one unit: it is chosen
    when all its parameters are vectors (norm weights, biases) or its kind is `norm`. What this cannot do: reach the
    bias of a projection whose component also owns the matrix (q, k, v biases at head granularity, every bias at layer
    granularity), or train the norms of a `rest` that also holds a table. For exact BitFit use a granularity function
    that splits biases off.

    Attributes:
        always_on: kinds or names that train beside them.
    """

    name: ClassVar[str] = "norms_or_bias_only"
    needs_map: ClassVar[bool] = False
    always_on: tuple[str, ...] = ("classifier",)

    def active(self, situation: Situation) -> frozenset[str]:
        vectors = frozenset(
            component.name
            for component in situation.components
            if component.kind == "norm" or (component.slices and all(len(s.shape) == 1 for s in component.slices))
        )
        if not vectors:
            raise ConfigError(
                "policy norms_or_bias_only: expected components that hold nothing but norms and biases, found none at "
                "this granularity; use granularity='head', or a function that splits them off"
            )
        return vectors | matching(situation.components, self.always_on, setting="policy.always_on")


@dataclass(frozen=True, kw_only=True)
class LayerWiseDecay(Policy):
    """f = ξ^(layers above): 1 for what runs after the layers, ξ for the last layer, ξ² below it, …

    Discriminative fine-tuning (Howard & Ruder, ACL 2018, section 3.1, ξ = 1/2.6); as layer-wise decay in Sun et al.,
    "How to Fine-Tune BERT for Text Classification?", 2019 (arXiv:1905.05583, ξ = 0.95). Everything is on.

    Attributes:
        xi: ξ, in (0, 1].
    """

    name: ClassVar[str] = "layer_wise_decay"
    needs_map: ClassVar[bool] = False
    xi: float = 0.95

    def __post_init__(self) -> None:
        if not 0.0 < self.xi <= 1.0:
            raise ConfigError(f"policy.xi: expected 0 < xi <= 1, found {self.xi}")

    def decide(self, situation: Situation) -> UpdatePlan:
        top = max((c.depth for c in situation.components if c.layer is not None), default=0) + 1
        multipliers = {c.name: self.xi ** max(0, top - c.depth) for c in situation.components}
        return make_plan(
            situation, frozenset(multipliers), multipliers=multipliers, reason=f"{self.name}: xi {self.xi:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Static(Policy):
    """One given plan throughout, e.g. the last plan of another run.

    Attributes:
        plan: the plan, or its `to_dict()`.
    """

    name: ClassVar[str] = "static"
    needs_map: ClassVar[bool] = False
    plan: UpdatePlan | Mapping[str, Any]

    @cached_property
    def _given(self) -> UpdatePlan:
        return self.plan if isinstance(self.plan, UpdatePlan) else UpdatePlan.from_dict(self.plan)

    def decide(self, situation: Situation) -> UpdatePlan:
        plan, previous = self._given, situation.previous
        if previous is not None and previous.reason.startswith(self.name) and previous.same_effect(plan):
            return previous
        names = {component.name for component in situation.components}
        missing, extra = sorted(names - set(plan.multipliers)), sorted(set(plan.multipliers) - names)
        if missing or extra:
            raise ConfigError(
                f"policy.plan: expected a plan for this model's {len(names)} components; missing {missing[:5]}, "
                f"unknown {extra[:5]} ({len(missing)} and {len(extra)} in all); was it made at another granularity?"
            )
        return replace(plan, step=situation.step, reason=f"{self.name}: {plan.reason}" if plan.reason else self.name)
