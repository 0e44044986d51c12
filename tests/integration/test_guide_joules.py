"""Budgets of joules: kept to, measured or estimated, whatever the pace turns out to be."""

from __future__ import annotations

from typing import Any

import pytest

from rgft import Budget, Config, Guide
from rgft.errors import BudgetError, ConfigError
from rgft.telemetry.energy import EnergyMeter
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, guided

BERT = FAMILIES["bert"]


class Counter:
    """Joules by arithmetic: so many for each FLOP booked, shown in whole `grain`s."""

    name = "a counter"

    def __init__(self, per_flop: float, grain: float = 0.0) -> None:
        self.guide: Guide | None = None
        self.per_flop, self.grain, self.readings, self.is_broken = per_flop, grain, 0, False
        self.base = 0.0

    def joules(self) -> float:
        self.readings += 1
        if self.is_broken:
            raise OSError("gone")
        flops = self.guide.ledger.spent_flops if self.guide is not None else 0.0
        joules = self.base + flops * self.per_flop
        return joules if not self.grain else joules // self.grain * self.grain


def metered(counter: Counter, budget: Any, *, watts: float = 10.0, pace: float | None = None, **settings: Any) -> Guide:
    guide = Guide(BERT.build(), Config(budget=budget, **settings))
    # No time passes beside that of the parts, so that all that is counted is theirs.
    guide._spending.meter = EnergyMeter(counter, watts=watts, note="", clock=lambda: 0.0)
    guide._spending._joules.pace = pace
    counter.guide = guide
    return guide


@pytest.mark.parametrize("grain", [0.0, 3.0])
@pytest.mark.parametrize("guess", [1e5, 1e6, 1e8])
@pytest.mark.parametrize("preset", ["rgft", "full"])
def test_the_energy_is_used_and_kept_to(preset: Any, guess: float, grain: float) -> None:
    counter = Counter(1e-6, grain)
    without_readout = {"mask": {"readout": 0.0}} if preset == "rgft" else {}  # a shallower cut's steps fill it better
    guide = metered(counter, {"joules": 60.0}, pace=guess, preset=preset, **without_readout)
    guided(guide, adamw(guide), Examples(BERT, 40), epochs=50)
    spent = guide.ledger.spent_joules
    assert 0.95 * 60.0 - grain <= spent <= 60.0 + grain
    assert guide.step_count > 10
    assert guide.budget_spent == pytest.approx(spent / 60.0)
    assert counter.readings <= guide.step_count + 3  # once a step, and at the beginning
    found = guide.summary()["energy"]
    assert found["source"] == "measured"
    assert sum(v for k, v in found["joules"].items() if k != "total") == pytest.approx(spent)


def test_a_counter_that_goes_missing_leaves_a_budget_that_holds() -> None:
    counter = Counter(1e-6)
    guide = metered(counter, {"joules": 60.0}, pace=1e6, preset="full")

    def breaks(guide: Guide) -> None:
        counter.is_broken = guide.step_count >= 4

    guided(guide, adamw(guide), Examples(BERT, 40), epochs=3, after_step=breaks)
    assert guide.summary()["energy"]["source"] == "measured in part"
    assert guide.ledger.spent_joules <= 1.05 * 60.0  # time is the machine's own from there on


def test_estimated_energy_is_watts_times_seconds() -> None:
    energy = {"watts": 20.0, "counter": "none", "carbon_intensity": 36.0}
    guide = Guide(BERT.build(), Config(budget=0.5, warmup_fraction=0.6, energy=energy))  # type: ignore[arg-type]
    guided(guide, adamw(guide), Examples(BERT, 40), epochs=2)
    ledger, found = guide.ledger, guide.summary()["energy"]
    assert found["source"] == "estimated"
    # Seconds of the last look for a batch came after the last step.
    assert ledger.spent_joules == pytest.approx(20.0 * ledger.elapsed, rel=0.05)
    for part in ("step", "probe"):
        assert found["joules"][part] == pytest.approx(20.0 * ledger.seconds[part], rel=0.05)
    assert found["co2_grams"] == pytest.approx(ledger.spent_joules / 1e5)
    assert found["notes"] == ["estimated: 20 W × seconds"]


def test_whichever_is_spent_first_ends_the_run() -> None:
    by_flops = metered(Counter(1e-6), Budget(flops=0.1, joules=1e6))
    guided(by_flops, adamw(by_flops), Examples(BERT, 40), epochs=5)
    assert by_flops.flops_fraction == pytest.approx(0.1, rel=0.15)
    by_joules = metered(Counter(1e-6), Budget(flops=0.9, joules=100.0), pace=1e6)
    guided(by_joules, adamw(by_joules), Examples(BERT, 40), epochs=50)
    assert 95.0 <= by_joules.ledger.spent_joules <= 100.0  # a step takes 3


def test_budgets_that_buy_no_step_say_what_would() -> None:
    guide = metered(Counter(1e-6), {"joules": 0.001}, pace=1e6)
    with pytest.raises(BudgetError, match=r"the budget of 0\.001 J is less than a step .* about [\d.]+ J"):
        guided(guide, adamw(guide), Examples(BERT, 40))
    with pytest.raises(ConfigError, match=r"budget\.joules: expected a number of joules > 0, found -1"):
        Config(budget={"joules": -1})
    with pytest.raises(ConfigError, match=r"energy\.watts"):
        Config(budget=0.3, energy={"watts": 0})


def test_a_resumed_run_keeps_to_what_is_left() -> None:
    counter = Counter(1e-6)
    first = metered(counter, {"joules": 60.0}, pace=1e6, preset="full")
    optimizer = adamw(first)
    guided(first, optimizer, Examples(BERT, 40), epochs=50, steps=5)
    state, spent = first.state_dict(), first.ledger.spent_joules
    first.detach()
    again = Counter(1e-6)
    second = metered(again, {"joules": 60.0}, preset="full")
    other = adamw(second)
    second.set_optimizer(other)
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(state)
    again.base = 500.0 - spent  # another boot: the counter stands elsewhere, and goes on from there
    assert second.ledger.spent_joules == spent
    guided(second, other, Examples(BERT, 40), epochs=50)
    assert 0.95 * 60.0 <= second.ledger.spent_joules <= 60.0
