"""Scaling, mask and period put together into one policy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from rgft.allocation.base import Mask, Period, Policy, Scaling, Situation
from rgft.allocation.periods import EveryStep
from rgft.allocation.scaling import MeanPreserved, Uniform
from rgft.allocation.selection import (
    CandidateMask,
    depends_on_map,
    make_plan,
    matching,
    narrowed,
    observations_needed,
    readout_share,
)
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan


@dataclass(frozen=True, kw_only=True)
class Composed(Policy):
    """One scaling, one mask, one period.

    Attributes:
        scaling: multipliers of what is on.
        mask: what is on; None: everything.
        period: how often.
        off_multiplier: multiplier of what the mask leaves off. Proposal B allows a very small value instead of 0; then
            nothing is saved, and the cut stays at the bottom.
        always_on: kinds (`"classifier"`) or whole component names that the mask does not decide about.
        label: name in the plan's reason.
    """

    name: ClassVar[str] = "composed"
    scaling: Scaling = field(default_factory=Uniform)
    mask: Mask | None = None
    period: Period = field(default_factory=EveryStep)
    off_multiplier: float = 0.0
    always_on: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.off_multiplier < 1.0:
            raise ConfigError(f"policy.off_multiplier: expected 0 <= off_multiplier < 1, found {self.off_multiplier}")

    @property
    def needs_map(self) -> bool:
        return bool(self._following)

    @property
    def min_observations(self) -> int:
        return min(map(observations_needed, self._following), default=1)

    @property
    def readout_share(self) -> float:
        return 0.0 if self.mask is None else readout_share(self.mask)

    @property
    def _following(self) -> list[Scaling | Mask | Period]:
        """The stages that follow the error map."""
        return [s for s in (self.scaling, self.mask, self.period) if s is not None and depends_on_map(s)]

    def decide(self, situation: Situation) -> UpdatePlan:
        active = self._active(situation)
        if isinstance(self.scaling, MeanPreserved):
            multipliers = self.scaling.among(situation, active)
        else:
            multipliers = self.scaling.multipliers(situation)
        stages = [self.scaling.name]
        if self.mask is not None:
            stages.append(self.mask.name)
        if not isinstance(self.period, EveryStep):
            stages.append(self.period.name)
        reason = f"{self.label or ' + '.join(stages)}: {len(active)} of {len(situation.components)} on"
        return make_plan(
            situation,
            active,
            multipliers=multipliers,
            periods=self.period.periods(situation),
            off_multiplier=self.off_multiplier,
            reason=reason,
        )

    def _active(self, situation: Situation) -> frozenset[str]:
        names = frozenset(component.name for component in situation.components)
        kept = matching(situation.components, self.always_on, setting="policy.always_on")
        if self.mask is None or kept == names:
            return names
        seen = replace(situation, previous=self._as_masked(situation.previous))
        if isinstance(self.mask, CandidateMask) and self.mask.candidates_only:
            seen = narrowed(seen, names - kept)
        return self.mask.active(seen) | kept

    def _as_masked(self, previous: UpdatePlan | None) -> UpdatePlan | None:
        """The plan in force with off components at 0, as the mask left them."""
        if previous is None or self.off_multiplier == 0.0:
            return previous
        on = {name: 0.0 if f == self.off_multiplier else f for name, f in previous.multipliers.items()}
        return replace(previous, multipliers=on)
