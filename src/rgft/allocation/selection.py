"""What all policies share: scores of a situation, ranking with stable ties, layers, and from a selection to a plan."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import get_args

from rgft.allocation.base import Mask, Period, Policy, Scaling, Situation
from rgft.components import Component, Kind
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


def observed_scores(situation: Situation) -> dict[str, float]:
    """Ê_k of the situation's observed components, in forward order."""
    values = ((c.name, situation.error_map.value(c.name)) for c in situation.components)
    return {name: value for name, value in values if value is not None}


def unobserved(situation: Situation) -> frozenset[str]:
    """Components without an observation: they are on, with multiplier 1."""
    return frozenset(c.name for c in situation.components if not situation.error_map.is_observed(c.name))


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Names by falling score. Ties go to the later component: at equal score it costs less dX to reach."""
    return [name for _, name in sorted(enumerate(scores), key=lambda item: (-scores[item[1]], -item[0]))]


def share_of(fraction: float, count: int) -> int:
    """⌈fraction · count⌉, not misled by a rounding error such as 0.1 · 30 = 3.0000000000000004."""
    return min(count, math.ceil(round(fraction * count, 9)))


def by_layer(components: Iterable[Component]) -> dict[str, tuple[Component, ...]]:
    """Layer path → its components, in forward order; what lies outside the layers is left out."""
    layers: dict[str, tuple[Component, ...]] = {}
    for component in components:
        if component.layer is not None:
            layers[component.layer] = (*layers.get(component.layer, ()), component)
    return layers


def observed_groups(situation: Situation, scope: str) -> list[dict[str, float]]:
    """Observed scores that compete with each other: of each layer (scope "layer"), or of the whole model ("global")."""
    scores = observed_scores(situation)
    if scope == "global":
        return [scores]
    layers = by_layer(situation.components).values()
    return [{c.name: scores[c.name] for c in members if c.name in scores} for members in layers]


def outside_layers(components: Iterable[Component]) -> frozenset[str]:
    """Embeddings, final norm, classifier, LM head: what belongs to no layer."""
    return frozenset(component.name for component in components if component.layer is None)


def after_layers(components: Sequence[Component]) -> frozenset[str]:
    """What runs after the last layer; without layers, what is deepest."""
    last = max((c.depth for c in components if c.layer is not None), default=max(c.depth for c in components) - 1)
    return frozenset(component.name for component in components if component.depth > last)


#: What trains beside layers that a policy chooses: all that is outside them, or what runs after them.
OUTSIDE = ("all", "after")


def beside_layers(components: Sequence[Component], which: str) -> frozenset[str]:
    """What is outside the layers: all of it, or what runs after them."""
    outside = outside_layers(components)
    return outside & after_layers(components) if which == "after" else outside


def matching(components: Iterable[Component], wanted: Collection[str], *, setting: str) -> frozenset[str]:
    """Names of the components whose kind or whole name is in `wanted`.

    A kind that the model does not have matches nothing.

    Raises:
        ConfigError: something in `wanted` is neither a kind nor a component's name; all of them are listed.
    """
    components = tuple(components)
    known = [*get_args(Kind), *(component.name for component in components)]
    problems = []
    for item in wanted:
        if item not in known:
            near = get_close_matches(item, known, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else f"; kinds are {', '.join(get_args(Kind))}"
            problems.append(f"{setting}: expected kinds or component names, found {item!r}{hint}")
    if problems:
        raise ConfigError(problems)
    return frozenset(c.name for c in components if c.kind in wanted or c.name in wanted)


def require_fraction(setting: str, value: float, *, zero: bool = False) -> None:
    """Raises ConfigError unless 0 < value <= 1 (or 0 <= value <= 1)."""
    if not (0.0 <= value <= 1.0 if zero else 0.0 < value <= 1.0):
        raise ConfigError(f"{setting}: expected 0 {'<=' if zero else '<'} {setting.split('.')[-1]} <= 1, found {value}")


def require_at_least(setting: str, value: float, least: float) -> None:
    """Raises ConfigError unless value >= least."""
    if not value >= least:
        raise ConfigError(f"{setting}: expected >= {least:g}, found {value}")


def require_choice(setting: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless value is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{setting}: expected one of {', '.join(map(repr, choices))}, found {value!r}")


def make_plan(
    situation: Situation,
    active: Collection[str],
    *,
    multipliers: Mapping[str, float] | None = None,
    periods: Mapping[str, int] | None = None,
    off_multiplier: float = 0.0,
    reason: str,
) -> UpdatePlan:
    """The plan that updates `active`; its cut is the depth of the lowest component with a multiplier above 0.

    When `active` is empty, one component stays on (the highest score, else the deepest), because a backward pass
    without any trainable parameter is an error; the reason says so.
    """
    scaled = multipliers or {}
    if not active:
        active = frozenset({_last_resort(situation)})
        reason += "; nothing passed, so the best one stays on"
    table = {
        c.name: (scaled.get(c.name, 1.0) if c.name in active else off_multiplier) for c in situation.components
    }  # fmt: skip
    return UpdatePlan(
        step=situation.step,
        multipliers=table,
        periods={name: n for name, n in (periods or {}).items() if n != 1 and table.get(name, 0.0) > 0.0},
        cut=min(c.depth for c in situation.components if table[c.name] > 0.0),
        reason=reason,
    )


def _last_resort(situation: Situation) -> str:
    ranked = ranking(observed_scores(situation))
    return ranked[0] if ranked else situation.components[-1].name


def previously_on(situation: Situation) -> frozenset[str]:
    """What the plan in force updates; nothing when there is none."""
    return frozenset(situation.previous.active()) if situation.previous is not None else frozenset()


def depends_on_map(stage: Policy | Mask | Scaling | Period) -> bool:
    """Whether its decisions change with the error map.

    A stage that does not say `needs_map = False` does. What does not depend on the map follows the step alone: it can
    be asked at every step, and needs no probes.
    """
    return bool(getattr(stage, "needs_map", True))


def decides_every_step(stage: Policy | Mask | Scaling | Period) -> bool:
    """Whether it may decide anew at any step: by the step alone, or because it says so, drawing from the same map."""
    return not depends_on_map(stage) or bool(getattr(stage, "decides_every_step", False))


def observations_needed(stage: Policy | Mask | Scaling | Period) -> int:
    """How many observations of a component it takes before it decides anything else than it would from none.

    One, unless the stage says so as `min_observations`: what shrinks scores by their uncertainty needs to know that.
    """
    return int(getattr(stage, "min_observations", 1))


def readout_share(stage: Policy | Mask) -> float:
    """What share of the run's FLOPs it gives for a readout (`rgft.readout`) before the first step; 0: it wants none."""
    return float(getattr(stage, "readout_share", 0.0))


class CandidateMask(Mask):
    """A mask that looks at nothing but the components it is given.

    When `candidates_only` holds, `Composed` gives it only those that are not always on, so that a fraction is a
    fraction of what there is to choose from. Masks that price whole plans need to see every component.
    """

    @property
    def candidates_only(self) -> bool:
        return True


class SelectionPolicy(Mask, Policy):
    """A policy that only chooses what is on: usable alone (multiplier 1), or as the mask of a `Composed`."""

    @abstractmethod
    def active(self, situation: Situation) -> frozenset[str]: ...

    def decide(self, situation: Situation) -> UpdatePlan:
        active = self.active(situation)
        reason = f"{self.name}: {len(active)} of {len(situation.components)} on"
        return make_plan(situation, active, reason=reason)


def narrowed(situation: Situation, names: Collection[str]) -> Situation:
    """The same situation with only the components in `names`."""
    return replace(situation, components=tuple(c for c in situation.components if c.name in names))
