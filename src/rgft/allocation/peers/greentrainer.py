"""GreenTrainer: the most important set whose backward pass fits a FLOPs ratio, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from rgft.allocation.base import Situation
from rgft.allocation.selection import SelectionPolicy, observed_scores, unobserved
from rgft.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class GreenTrainer(SelectionPolicy):
    """max Σ_on I_k subject to F + dX(lowest on) + Σ_on dW_k ≤ ρ × the step with everything on.

    Huang et al., "Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation", ICLR 2024
    (arXiv:2309.13192), section 3.3: importance I_k = −⟨g_k, Δθ_k⟩ (signal `predicted_decrease`), selection by dynamic
    programming over depth and discretised cost. Scores ≤ 0 buy nothing and are left off. The dW of a component is taken
    as its own whatever else is on, and dX as that of the component reached last, exact for a chain of layers; where
    branches make a set dearer than that, the search is repeated with less until the set fits.
    Costs are rounded up to 1/resolution of the budget, so that the result never exceeds it. Unobserved components are
    on and paid for first. Outside a plan: GreenTrainer measures importance with a trial step that is taken back, where
    Adam's moments are not; RGFT's probes move nothing.

    Attributes:
        rho: ρ, share of the FLOPs of a full step, in (0, 1].
        resolution: number of cost steps in the budget; None: exact, exponential time in the worst case.
    """

    name: ClassVar[str] = "greentrainer"
    rho: float = 0.5
    resolution: int | None = 1000

    def __post_init__(self) -> None:
        if not 0.0 < self.rho <= 1.0:
            raise ConfigError(f"policy.rho: expected 0 < rho <= 1, found {self.rho}")
        if self.resolution is not None and self.resolution < 1:
            raise ConfigError(f"policy.resolution: expected >= 1 or None, found {self.resolution}")

    def active(self, situation: Situation) -> frozenset[str]:
        costs = situation.costs
        if costs is None:
            raise ConfigError("policy greentrainer needs a cost model, found none in the situation")

        def step(names: Collection[str]) -> tuple[float, float, float]:
            cost = costs.step_flops(names, rows=situation.rows, tokens=situation.tokens)
            return cost.total, cost.dx, cost.dw + cost.pairs

        full = step([component.name for component in situation.components])[0]
        alone = {component.name: step([component.name]) for component in situation.components}
        forward = {name: total - dx - dw for name, (total, dx, dw) in alone.items()}
        minimum = min(total for total, _, _ in alone.values())
        if minimum > self.rho * full:
            raise BudgetError(
                f"policy.rho: no component fits {self.rho:g} of a full step's FLOPs; the smallest share that fits one "
                f"is {minimum / full:.3g}"
            )
        waiting = unobserved(situation)
        budget = self.rho * full - max(forward.values()) - sum(alone[name][2] for name in waiting)
        reached = max((alone[name][1] for name in waiting), default=0.0)
        wanted = {name: score for name, score in observed_scores(situation).items() if score > 0.0}
        items = [(max(alone[name][1], reached), alone[name][2], score, name) for name, score in wanted.items()]
        chosen = best_set(items, budget, self.resolution)
        # Where branches run side by side, the dX of a set is more than that of its deepest member.
        while chosen and (excess := step(waiting | chosen)[0] - self.rho * full) > 1e-9 * full:
            budget -= excess
            chosen = best_set(items, budget, self.resolution)
        return waiting | chosen


def best_set(
    items: list[tuple[float, float, float, str]], budget: float, resolution: int | None
) -> frozenset[str]:  # fmt: skip
    """The names with the largest Σ value and max dX + Σ dW ≤ budget.

    Args:
        items: (dX needed to reach it, its dW, its value > 0, its name).
        budget: FLOPs for both.
        resolution: cost steps in the budget; None: exact.

    Items join by rising dX. After all that share one dX, the frontier of (cost, value) pairs that no other beats holds
    the optimum for that reach.
    """
    if budget <= 0.0:
        return frozenset()
    grain = budget / resolution if resolution else 0.0

    def rounded(flops: float) -> float:
        # A hair of tolerance: 0.3 / 0.1 is not 3 in floating point.
        return math.ceil(flops / grain - 1e-9) * grain if grain else flops

    frontier: list[tuple[float, float, frozenset[str]]] = [(0.0, 0.0, frozenset())]
    best: tuple[float, frozenset[str]] = (0.0, frozenset())
    for reach, cost, value, name in sorted(items):
        left = budget - reach
        if left < 0.0:
            break
        added = [(c + rounded(cost), v + value, names | {name}) for c, v, names in frontier]
        frontier = _undominated([*frontier, *(state for state in added if state[0] <= budget * (1 + 1e-12))])
        value_now, names_now = max(
            ((v, names) for c, v, names in frontier if c <= left * (1 + 1e-12)), key=lambda state: state[0]
        )
        if value_now > best[0]:
            best = (value_now, names_now)
    return best[1]


def _undominated(states: list[tuple[float, float, frozenset[str]]]) -> list[tuple[float, float, frozenset[str]]]:
    kept: list[tuple[float, float, frozenset[str]]] = []
    for state in sorted(states, key=lambda state: (state[0], -state[1])):
        if not kept or state[1] > kept[-1][1]:
            kept.append(state)
    return kept
