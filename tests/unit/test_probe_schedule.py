from types import SimpleNamespace
from typing import Any, cast

import pytest

from rgft.config import ProbeConfig
from rgft.probe_schedule import MIN_PROBE_SIZE, TARGET_PROBES, ProbePool, ProbeSchedule, set_aside
from rgft.prober import MAX_SCORED_STEPS, Prober


def derive(allowed: float, **kwargs: object) -> ProbeSchedule:
    settings = {"interval": "auto", "size": "auto", "steps": 1000, **kwargs}
    return ProbeSchedule.derive(flops_allowed=allowed, flops_per_example=1.0, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("allowed", [1.0, 10.0, 70.0, 300.0, 5000.0])
@pytest.mark.parametrize("size", ["auto", 20])
def test_derived_probes_fit_their_share_however_many_steps_there_are(allowed: float, size: object) -> None:
    schedule = derive(allowed, size=size)
    for steps in (15, 400):
        last, probes = 0.0, 0
        for step in range(steps):
            progress = step / steps
            if schedule.is_due(step=step, last_step=0, progress=progress, last_progress=last):
                last, probes = progress, probes + 1
        assert probes * schedule.size <= allowed
        assert probes == schedule.number
    assert schedule.number == min(TARGET_PROBES, int(allowed / (MIN_PROBE_SIZE if size == "auto" else 20)))


def test_numbers_are_taken_as_given() -> None:
    assert derive(1.0, interval=100, size=32) == ProbeSchedule(interval=100, size=32)
    assert not derive(1e9, interval=0).is_on
    assert not derive(1e9, interval=2000).is_on


def test_interval_in_steps() -> None:
    schedule = ProbeSchedule(interval=5, size=8)
    due = [s for s in range(12) if schedule.is_due(step=s, last_step=3, progress=0.0, last_progress=0.0)]
    assert due == [8, 9, 10, 11]


def test_so_many_steps_are_scored_while_measuring_whatever_a_step_takes() -> None:
    """A fifth of 320 steps, each of four micro-batches: every second one."""
    costs = SimpleNamespace(probe_flops=lambda *shape, weights: 1.0)
    spending = SimpleNamespace(costs=costs, optimizer_flops={}, allowed=1e4, typical=(1, 1), accumulation=4)
    prober = Prober(None, ProbeConfig(), cast("Any", spending))
    prober.plan(steps=320, measuring=0.2, examples=1000)
    assert sum(prober.scores_step(step) for step in range(64)) == MAX_SCORED_STEPS


def test_pool_goes_round_and_resumes() -> None:
    pool = ProbePool([3, 5, 7], list, seed=0)
    drawn = [pool.draw(2) for _ in range(3)]
    assert sorted(drawn[0] + drawn[1][:1]) == [3, 5, 7]
    assert sorted(drawn[1][1:] + drawn[2]) == [3, 5, 7]
    resumed = ProbePool([3, 5, 7], list, seed=0)
    resumed.draw(2)
    again = ProbePool([3, 5, 7], list, seed=0)
    again.load_state_dict(resumed.state_dict())
    assert again.draw(4) == resumed.draw(4)


def test_set_aside_is_disjoint_and_at_most_a_tenth() -> None:
    train, pool = set_aside(100, 50, seed=0)
    assert len(pool) == 10
    assert sorted(train + pool) == list(range(100))
    assert set_aside(100, 50, seed=0) == (train, pool)
    assert set_aside(100, 4, seed=1)[1] != set_aside(100, 4, seed=0)[1]
