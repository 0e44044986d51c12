"""The learning rate, chosen inside the budget by successive halving (Jamieson & Talwalkar 2016; Li et al. 2018).

Once the cut is decided, every candidate trains from the same point on the same batches, with the same dropout, and so
on the same cached activations of the frozen prefix. A candidate is judged by its loss on each batch before it trains
on it: in the first epoch these are examples that it has not seen, and judging costs nothing. The worse half is dropped,
the others go on. What the dropped ones spent counts against the budget, and the winner's state goes on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Self

from torch.optim.lr_scheduler import LRScheduler

from rgft.errors import NonFiniteError
from rgft.execution.snapshot import Snapshot
from rgft.guide import Guide
from rgft.learning_rate import scale_rates
from rgft.telemetry.ledger import Ledger

#: Share of the steps left that candidates who lose may make; reading cached activations they cost less than others.
SHARE = 0.1
#: Rounds of fewer steps would tell nothing.
MIN_STEPS = 3
#: Batches that a candidate is judged on at least, where it has made so many steps.
MIN_JUDGED = 8
#: Candidates where none are given, as multiples of the usual rate.
FACTORS = (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a search.

    Attributes:
        steps: that each candidate made in it.
        losses: candidate → mean loss on the last batches up to its end (see `judged`), each before its step; infinite
            where the candidate diverged.
    """

    steps: int
    losses: dict[float, float]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a learning rate was found.

    Attributes:
        rate: the winner.
        rounds: in order.
        flops, seconds, joules: that losers spent.
    """

    rate: float
    rounds: tuple[Round, ...]
    flops: float
    seconds: float
    joules: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON: losses as pairs of rate and loss, which is None where the candidate diverged."""
        rounds = [
            {"steps": r.steps, "losses": [[c, v if math.isfinite(v) else None] for c, v in r.losses.items()]}
            for r in self.rounds
        ]
        return {**asdict(self), "rounds": rounds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Restores `to_dict`."""
        rounds = (
            Round(steps=r["steps"], losses={rate: math.inf if loss is None else loss for rate, loss in r["losses"]})
            for r in data["rounds"]
        )
        return cls(**{**data, "rounds": tuple(rounds)})


def are_rates(rates: Sequence[Any]) -> bool:
    """Whether these can be candidates: finite numbers above 0, each once, at least one."""
    are_numbers = all(isinstance(rate, float | int) and 0.0 < rate < math.inf for rate in rates)
    return bool(rates) and are_numbers and len(set(rates)) == len(rates)


def first_rate(rates: Sequence[float]) -> float:
    """What the run begins with, before it searches: the lower of the middle ones."""
    return sorted(rates)[(len(rates) - 1) // 2]


def rounds_within(rates: Sequence[float], steps_left: float) -> tuple[tuple[float, ...], list[int]]:
    """Which candidates a run has steps for, and the steps of each round, each twice as long as the one before.

    Args:
        rates: candidates. Where there are too many, those nearest to the first rate stay.
        steps_left: of the run.

    Returns:
        Candidates, rising, and the rounds; no round where there are not even two candidates to compare.
    """
    first = first_rate(rates)
    nearest = sorted(rates, key=lambda rate: (round(abs(math.log(rate / first)), 6), -rate))
    for count in range(len(rates), 1, -1):
        if rounds := _rounds(count, steps_left):
            return tuple(sorted(nearest[:count])), rounds
    return (first,), []


def _rounds(candidates: int, steps_left: float) -> list[int]:
    lost, alive, made = 0, candidates, 0  # in units of the first round's steps
    lengths: list[int] = []
    while alive > 1:
        length, kept = 1 << len(lengths), -(-alive // 2)
        made += length
        lost += (alive - kept) * made
        lengths.append(length)
        alive = kept
    steps = int(SHARE * steps_left / lost) if lost and math.isfinite(steps_left) else 0
    return [length * steps for length in lengths] if steps >= MIN_STEPS else []


def successive_halving(
    rates: Sequence[float], lengths: Sequence[int], train: Callable[[float, int], Sequence[float]],
    end_of_round: Callable[[Sequence[float]], None],
) -> tuple[float, tuple[Round, ...]]:  # fmt: skip
    """Runs the rounds.

    Args:
        rates: candidates.
        lengths: steps of each round.
        train: (rate, steps) → losses of these steps; goes on from where this rate is.
        end_of_round: told which candidates are left.

    Raises:
        NonFiniteError: all candidates diverged.
    """
    rounds: list[Round] = []
    alive, seen = list(rates), {rate: list[float]() for rate in rates}
    for steps in lengths:
        for rate in alive:
            try:
                seen[rate] += train(rate, steps)
            except NonFiniteError:
                seen[rate].append(math.inf)
        losses = {rate: judged(seen[rate]) for rate in alive}
        rounds.append(Round(steps=steps, losses=losses))
        ranked = sorted((loss, rate) for rate, loss in losses.items() if math.isfinite(loss))
        if not ranked:
            raise NonFiniteError(
                f"learning rates {', '.join(f'{rate:g}' for rate in alive)} all diverged; search lower ones"
            )
        alive = sorted(rate for _, rate in ranked[: -(-len(alive) // 2)])
        end_of_round(alive)
        if len(alive) == 1:
            break
    return min(alive, key=lambda rate: rounds[-1].losses[rate]), tuple(rounds)


def judged(losses: Sequence[float]) -> float:
    """Mean of the later half of the losses, or of the last MIN_JUDGED, but not of the first, which all share."""
    number = max(len(losses) // 2, min(len(losses) - 1, MIN_JUDGED))
    return fmean(losses[-number:]) if number > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A point of the run that a candidate can go on from."""

    values: Snapshot
    guide: dict[str, Any]
    scheduler: dict[str, Any]

    def charge(self, spent: Sequence[float]) -> None:
        """Books what other candidates spent: FLOPs, seconds, joules, and how many of these were measured."""
        ledger = Ledger.from_dict(self.guide["spending"]["ledger"])
        ledger.add_search(flops=spent[0], seconds=spent[1], joules=spent[2])
        ledger.measured_joules += spent[3]
        self.guide["spending"]["ledger"] = ledger.to_dict()


class RateSearch:
    """Searches the learning rate of a run that is under way, under the plan in force.

    Args:
        guide: of the run, its optimizer attached.
        scheduler: of the optimizer.
        train: (rate, steps) → trains so many steps from where the run is, returns their losses, each before its step.
    """

    def __init__(
        self, guide: Guide, scheduler: LRScheduler, train: Callable[[float, int], Sequence[float]]
    ) -> None:  # fmt: skip
        self._guide, self._scheduler, self._train = guide, scheduler, train

    def run(self, rates: Sequence[float], *, reference: float, lengths: Sequence[int]) -> Search:
        """Leaves the run where the winner is; or, when it raises, where it was.

        Args:
            rates: candidates.
            reference: the rate that the run has now.
            lengths: steps of each round.

        Raises:
            NonFiniteError: all candidates diverged.
        """
        start = self._here()
        points: dict[float, _Point] = {}
        spent: dict[float, tuple[float, ...]] = {}  # in the order of `charge`

        def train(rate: float, steps: int) -> Sequence[float]:
            self._go_to(points.get(rate, start))
            before = _spent(self._guide.ledger)
            if rate not in points:
                assert self._guide.optimizer is not None
                scale_rates(self._guide.optimizer, self._scheduler, rate / reference)
            try:
                return self._train(rate, steps)
            finally:
                now = _spent(self._guide.ledger)
                spent[rate] = tuple(after - then for after, then in zip(now, before, strict=True))
                points[rate] = self._here()

        def end_of_round(alive: Sequence[float]) -> None:
            total = [sum(cost) for cost in zip(*spent.values(), strict=True)]
            for rate in spent.keys() - set(alive):
                del points[rate]
            for rate in alive:
                points[rate].charge([whole - own for whole, own in zip(total, spent[rate], strict=True)])
            spent.clear()

        try:
            with self._guide.holding_plan():
                rate, rounds = successive_halving(rates, lengths, train, end_of_round)
        except BaseException:
            self._go_to(start)
            raise
        self._go_to(points[rate])
        ledger = self._guide.ledger
        return Search(
            rate=rate, rounds=rounds, flops=ledger.search_flops, seconds=ledger.seconds["search"],
            joules=ledger.joules.get("search", 0.0),
        )  # fmt: skip

    def _here(self) -> _Point:
        guide = self._guide
        assert guide.optimizer is not None
        return _Point(
            values=Snapshot(guide.model, guide.trained_parameters, guide.optimizer),
            guide=guide.state_dict(cache=False, weights=False), scheduler=copy.deepcopy(self._scheduler.state_dict()),
        )  # fmt: skip

    def _go_to(self, point: _Point) -> None:
        point.values.restore()
        self._scheduler.load_state_dict(copy.deepcopy(point.scheduler))
        self._guide.rewind(point.guide)


def _spent(ledger: Ledger) -> tuple[float, ...]:
    return ledger.spent_flops, ledger.elapsed, ledger.spent_joules, ledger.measured_joules
