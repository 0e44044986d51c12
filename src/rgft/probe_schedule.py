"""When to probe, and with how many examples, so that scoring stays within its share of the budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Probes after the measuring phase, when the budget allows: enough to follow the map, few enough to be large.
TARGET_PROBES = 8
#: Fewer examples than this say more about the draw than about the model.
MIN_PROBE_SIZE = 8
MAX_PROBE_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class ProbeSchedule:
    """Probes of `size` examples: every `interval` steps, or `number` of them evenly over what the run spends.

    Steps cost less once a cut is made, so that an interval in steps would overshoot its share.
    Shares of the run cannot.
    """

    size: int = 0
    interval: int = 0
    number: int = 0

    @property
    def is_on(self) -> bool:
        return self.size > 0 and (self.interval > 0 or self.number > 0)

    def is_due(self, *, step: int, last_step: int, progress: float, last_progress: float) -> bool:
        """Whether a probe is due before `step`, the last one having been before `last_step`."""
        if not self.is_on:
            return False
        if self.interval:
            return step - last_step >= self.interval
        return int(progress * (self.number + 1)) > int(last_progress * (self.number + 1))

    @classmethod
    def derive(
        cls, *, interval: int | str, size: int | str, steps: int, flops_allowed: float, flops_per_example: float
    ) -> ProbeSchedule:
        """Fills in what is "auto".

        Args:
            interval, size: numbers, or "auto". Interval or size 0 means no probes.
            steps: optimizer steps of the whole run.
            flops_allowed: what all probes together may cost.
            flops_per_example: of one probe.

        Returns:
            As many probes as fit, up to TARGET_PROBES, of MIN_PROBE_SIZE to MAX_PROBE_SIZE examples; none when not even
            one fits.
        """
        affordable = flops_allowed / flops_per_example
        if isinstance(interval, int):
            number = steps // interval if interval else 0
        else:
            number = min(TARGET_PROBES, int(affordable / ((size if isinstance(size, int) else MIN_PROBE_SIZE) or 1)))
        if number < 1 or size == 0:
            return cls()
        if isinstance(size, str):
            size = max(MIN_PROBE_SIZE, min(MAX_PROBE_SIZE, int(affordable / number)))
        return cls(size=size, interval=interval) if isinstance(interval, int) else cls(size=size, number=number)


class ProbePool:
    """Examples that are never trained on, handed out in turn.

    Args:
        pool: ids of the examples set aside.
        load: ids → collated batch.
        seed: of the order.
    """

    def __init__(self, pool: Sequence[int], load: Any, *, seed: int) -> None:
        self._pool, self._load, self._seed = list(pool), load, seed
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._pool)

    def draw(self, count: int) -> Any:
        """The next `count` examples, collated; the pool is reshuffled each time it has been gone through."""
        ids: list[int] = []
        while len(ids) < count:
            turn, place = divmod(self._drawn, len(self._pool))
            order = random.Random(f"{self._seed}/{turn}").sample(self._pool, len(self._pool))
            taken = order[place : place + count - len(ids)]
            ids += taken
            self._drawn += len(taken)
        return self._load(ids)

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._drawn = state["drawn"]


def set_aside(total: int, wanted: int, *, seed: int) -> tuple[list[int], list[int]]:
    """Splits the ids 0…total−1 into (train, probe pool), the pool holding `wanted` but at most a tenth."""
    wanted = min(wanted, total // 10)
    pool = set(random.Random(f"pool/{seed}").sample(range(total), wanted))
    return [i for i in range(total) if i not in pool], sorted(pool)
