"""How far a limit of something other than FLOPs reaches, at the pace of the run's own last steps."""

from __future__ import annotations

from typing import Any

#: Weight of what was known in the running pace, per step: about the last five steps count.
PACE_MEMORY = 0.8


class PacedLimit:
    """A limit in seconds or joules, and what it buys in FLOPs.

    Args:
        limit: of the whole run; None does not limit.

    Attributes:
        pace: FLOPs per unit; None: not known yet.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.pace: float | None = None
        self._seen = (0.0, 0.0)  # FLOPs and units when the pace was last seen

    def observe(self, flops: float, amount: float, *, steps: int) -> None:
        """After a step: what was spent so far.

        Args:
            flops, amount: of the run.
            steps: of the run. What is known before the third is a guess: the first steps are slow.
        """
        passed, taken = flops - self._seen[0], amount - self._seen[1]
        if self.limit is None or passed <= 0.0 or taken <= 0.0:
            return  # a coarse counter has not moved yet: the next steps count together
        self._seen, pace = (flops, amount), passed / taken
        is_known = self.pace is not None and steps > 2
        self.pace = PACE_MEMORY * self.pace + (1.0 - PACE_MEMORY) * pace if is_known and self.pace else pace

    def flops_left(self, amount: float) -> float | None:
        """What is still bought after `amount` was spent; None without a limit or a pace."""
        if self.limit is None or self.pace is None:
            return None
        return max(0.0, self.limit - amount) * self.pace

    def amount_of(self, flops: float) -> float | None:
        """Units that FLOPs take; None without a limit or a pace."""
        return None if self.limit is None or self.pace is None else flops / self.pace

    def state_dict(self) -> dict[str, Any]:
        return {"pace": self.pace, "seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pace, self._seen = state["pace"], (state["seen"][0], state["seen"][1])
