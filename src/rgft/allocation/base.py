"""The protocols of deciding: pure functions from a `Situation` to an `UpdatePlan`.

A policy is composed of small stages: a `Scaling` says how large each multiplier is, a `Mask` which components are on,
a period how often they are updated. `compose.py` puts them together; nothing here or beside it touches a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from rgft.components import Component
from rgft.error_map import ErrorMap
from rgft.plan import UpdatePlan

if TYPE_CHECKING:
    from rgft.cost import CostModel


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a decision may depend on. Everything stems from steps before `step`.

    Attributes:
        step: the optimizer step that the plan is for.
        total_steps: the run's length in optimizer steps (`RunPlan.steps`), or None when unknown.
        components: in forward order.
        error_map: Ê_k of the policy's signal.
        previous: the plan in force, or None at the start.
        seed: of the run; random policies derive their choice from it, the step and nothing else.
        gradient_norm_squared: EMA of ‖∇L‖² over all parameters, before clipping; None when not measured.
        same_batch_map: Ê_k of the same-batch decrease, beside a map of the generalising one; None when not measured.
        costs: FLOPs of any plan; None when the run has no cost model.
        flops_left: what the run may still spend; None without a budget.
        flops_allowed: what the whole run may spend; None without a budget.
        batches: micro-batches of all epochs; None when unknown.
        batches_per_epoch: micro-batches; None when unknown.
        accumulation: micro-batches per optimizer step.
        rows, tokens: shape of a typical micro-batch, for `costs`.
        is_cached: whether an activation cache keeps what lies below a cut.
        unexplained: depth of a layer → share of the targets' variance that a linear map of its output left
            unexplained before the first step, at most (`Readout.at_most`); empty where that was not read.
        lowest_cut: memory holds no plan that trains anything below it; 0: it holds all.
    """

    step: int
    components: tuple[Component, ...]
    error_map: ErrorMap
    total_steps: int | None = None
    previous: UpdatePlan | None = None
    seed: int = 0
    gradient_norm_squared: float | None = None
    same_batch_map: ErrorMap | None = None
    costs: CostModel | None = None
    flops_left: float | None = None
    flops_allowed: float | None = None
    batches: int | None = None
    batches_per_epoch: int | None = None
    accumulation: int = 1
    rows: int = 1
    tokens: int = 1
    is_cached: bool = False
    unexplained: Mapping[int, float] = field(default_factory=dict)
    lowest_cut: int = 0

    @property
    def steps_in_data(self) -> float | None:
        """Optimizer steps that the micro-batches of all epochs make; None when unknown."""
        return None if self.batches is None else self.batches / self.accumulation

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps that the micro-batches of an epoch make; None when unknown."""
        return None if self.batches_per_epoch is None else self.batches_per_epoch / self.accumulation


class Policy(ABC):
    """Decides the next update plan. Pure: the same situation gives the same plan."""

    name: ClassVar[str]

    @abstractmethod
    def decide(self, situation: Situation) -> UpdatePlan: ...


class Scaling(ABC):
    """Learning-rate multiplier per component. Unobserved components get 1."""

    name: ClassVar[str]

    @abstractmethod
    def multipliers(self, situation: Situation) -> dict[str, float]: ...


class Mask(ABC):
    """Which components are on. Unobserved components are on, unless the mask does not depend on the map."""

    name: ClassVar[str]

    @abstractmethod
    def active(self, situation: Situation) -> frozenset[str]: ...


class Period(ABC):
    """Update every n-th step, per component; components left out have period 1."""

    name: ClassVar[str]

    @abstractmethod
    def periods(self, situation: Situation) -> Mapping[str, int]: ...
