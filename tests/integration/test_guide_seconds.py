"""Budgets of seconds: kept to, whatever the pace turns out to be."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rgft import Budget, Config, Guide
from rgft.errors import BudgetError
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, guided

BERT = FAMILIES["bert"]


class Clock:
    """Time that passes by arithmetic: `per_flop` seconds for each FLOP booked, and `per_batch` for loading one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, per_flop: float) -> None:
        self.guide: Guide | None = None
        self.per_flop, self.extra = per_flop, 0.0
        monkeypatch.setattr(time, "perf_counter", self.now)

    def now(self) -> float:
        spent = self.guide.ledger.spent_flops if self.guide is not None else 0.0
        return spent * self.per_flop + self.extra


def run(clock: Clock, budget: Any, *, epochs: float = 50, pace: float = 1e6, **settings: Any) -> Guide:
    guide = Guide(BERT.build(), Config(budget=budget, **settings))
    guide._spending._seconds.pace = pace
    clock.guide = guide
    guided(guide, adamw(guide), Examples(BERT, 40), epochs=epochs)
    return guide


@pytest.mark.parametrize("guess", [1e5, 1e6, 1e8])
@pytest.mark.parametrize("preset", ["rgft", "full"])
def test_the_time_is_used_and_kept_to(monkeypatch: pytest.MonkeyPatch, preset: Any, guess: float) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    guide = run(clock, {"seconds": 60.0}, pace=guess, preset=preset)
    elapsed = guide.ledger.elapsed
    assert 0.95 * 60.0 <= elapsed <= 60.0
    assert guide.step_count > 10
    assert guide.progress == pytest.approx(elapsed / 60.0)
    assert guide.budget_spent == pytest.approx(elapsed / 60.0)


def test_a_machine_that_slows_down_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    guide = Guide(BERT.build(), Config(budget={"seconds": 60.0}, preset="full"))
    guide._spending._seconds.pace = 1e6
    clock.guide = guide

    def slower(guide: Guide) -> None:
        if guide.step_count == 10:  # three times as slow from here on, with time going on where it was
            clock.extra = clock.now() - guide.ledger.spent_flops * 3e-6
            clock.per_flop = 3e-6

    guided(guide, adamw(guide), Examples(BERT, 40), epochs=50, after_step=slower)
    assert 0.9 * 60.0 <= guide.ledger.elapsed <= 60.0


def test_whichever_is_spent_first_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    by_flops = run(clock, Budget(flops=0.1, seconds=1e4), epochs=5)
    assert by_flops.flops_fraction == pytest.approx(0.1, rel=0.15)
    assert by_flops.ledger.elapsed < 1e4
    by_time = run(clock, Budget(flops=1.0, seconds=20.0), epochs=50)
    assert by_time.flops_fraction < 0.9
    assert 0.85 * 20.0 <= by_time.ledger.elapsed <= 20.0  # a step takes about 4


def test_probes_keep_to_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    guide = run(clock, {"seconds": 300.0}, epochs=400, probe={"size": 2})
    assert guide.ledger.probes > 0
    assert guide.ledger.probe_flops <= 0.03 * guide.ledger.spent_flops


def test_waiting_for_data_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)

    class Slow(Examples):
        def __getitem__(self, index: int) -> Any:
            clock.extra += 0.5
            return super().__getitem__(index)

    guide = Guide(BERT.build(), Config(budget={"seconds": 60.0}, preset="full"))
    guide._spending._seconds.pace = 1e6
    clock.guide = guide
    guided(guide, adamw(guide), Slow(BERT, 40), epochs=50)
    assert guide.ledger.seconds["data"] >= 0.5 * 4 * guide.step_count
    assert guide.ledger.elapsed <= 60.0


def test_too_little_time_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    with pytest.raises(BudgetError, match=r"the budget of 0.001 s is less than a step of the cheapest plan"):
        run(clock, {"seconds": 0.001})


def test_pace_and_place_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, per_flop=1e-6)
    guide = run(clock, {"seconds": 20.0})
    other = Guide(BERT.build(), guide.config)
    other.set_optimizer(adamw(other))
    other.load_state_dict(guide.state_dict())
    assert other.ledger.elapsed == guide.ledger.elapsed
    assert other._spending._seconds.pace == pytest.approx(1e6, rel=0.01)
