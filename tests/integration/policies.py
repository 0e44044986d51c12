"""A policy that tests steer: each step's active set is given by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from rgft.allocation.base import Policy, Situation
from rgft.allocation.selection import make_plan
from rgft.guide import Guide
from rgft.plan import UpdatePlan


class Scripted(Policy):
    """`active(situation)` is on, with the multipliers given. Follows the step alone unless told otherwise."""

    name = "scripted"

    def __init__(
        self, active: Callable[[Situation], Collection[str]], multipliers: Mapping[str, float] | None = None
    ) -> None:
        self._active, self._multipliers = active, multipliers

    def decide(self, situation: Situation) -> UpdatePlan:
        return make_plan(situation, self._active(situation), multipliers=self._multipliers, reason="scripted")


def steer(guide: Guide, policy: Policy, *, follows_map: bool = False) -> None:
    """Puts `policy` in place of the guide's own. Without a map to follow it is asked at every step."""
    vars(policy)["needs_map"] = follows_map
    decisions = guide._decisions
    decisions._policy, decisions.follows_map = policy, follows_map
    if not follows_map:
        decisions.is_measuring = False
