from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgft.allocation.peers.greentrainer import GreenTrainer
from rgft.errors import BudgetError, ConfigError


def best_by_brute_force(components: Any, costs: Any, scores: list[float], rho: float) -> float:
    """Largest Σ I of any set whose step costs at most ρ of the full one."""
    names = [c.name for c in components]
    value = dict(zip(names, scores, strict=True))
    limit = rho * costs.step_flops(names, rows=2, tokens=3).total * (1 + 1e-12)
    best = 0.0
    for size in range(1, len(names) + 1):
        for subset in itertools.combinations(names, size):
            if costs.step_flops(subset, rows=2, tokens=3).total <= limit:
                best = max(best, sum(value[name] for name in subset))
    return best


@given(
    data=st.data(), rho=st.sampled_from([0.4, 0.5, 0.6, 0.75, 0.9, 1.0]),
    depths=st.lists(st.integers(0, 3), min_size=2, max_size=8),
)  # fmt: skip
def test_the_dynamic_programme_against_brute_force(make: Any, data: Any, rho: float, depths: list[int]) -> None:
    components = tuple(make.component(f"c{i}", d, layer=f"l{d}") for i, d in enumerate(sorted(depths)))
    count = len(components)
    dw = data.draw(st.lists(st.integers(1, 60).map(float), min_size=count, max_size=count))
    scores = data.draw(st.lists(st.integers(-5, 20).map(float), min_size=count, max_size=count))
    costs = make.costs(components, {c.name: w for c, w in zip(components, dw, strict=True)}, dx=25.0)
    situation = make.situation(components, scores, costs=costs, rows=2, tokens=3)
    value = dict(zip((c.name for c in components), scores, strict=True))

    def spent(on: frozenset[str]) -> float:
        return costs.step_flops(on, rows=2, tokens=3).total if on else 0.0

    limit = rho * spent(frozenset(value))
    cheapest = min(spent(frozenset({name})) for name in value)
    if cheapest > limit:
        with pytest.raises(BudgetError, match="smallest share"):
            GreenTrainer(rho=rho).active(situation)
        return
    best = best_by_brute_force(components, costs, scores, rho)
    exact = GreenTrainer(rho=rho, resolution=None).active(situation)
    assert sum(value[name] for name in exact) == best
    coarse = GreenTrainer(rho=rho, resolution=50).active(situation)
    assert sum(value[name] for name in coarse) <= best
    for on in (exact, coarse):
        assert spent(on) <= limit * (1 + 1e-9)
        assert all(value[name] > 0 for name in on)
    fine = GreenTrainer(rho=rho, resolution=200_000).active(situation)
    tight = best_by_brute_force(components, costs, scores, rho * (1 - 2e-4))
    assert tight <= sum(value[name] for name in fine) <= best


def test_unobserved_components_are_paid_for_first(make: Any) -> None:
    components = make.flat(5)
    costs = make.costs(components, dict.fromkeys((c.name for c in components), 40.0))
    on = GreenTrainer(rho=0.6).active(make.situation(components, {"c4": 1.0, "c3": 9.0, "c0": 1.0}, costs=costs))
    assert on == {"c1", "c2"}
    assert GreenTrainer(rho=0.6).active(make.situation(components, costs=costs)) == {c.name for c in components}


def test_side_branches_do_not_overrun_the_budget(make: Any) -> None:
    components = make.flat(6)

    class Branches(make.costs):
        def step_flops(self, active: Any, *, rows: int, tokens: int) -> Any:
            cost = super().step_flops(active, rows=rows, tokens=tokens)
            return type(cost)(cost.forward, cost.dx + 30.0 * (len(set(active)) - 1), cost.dw)

    costs = Branches(components, dict.fromkeys((c.name for c in components), 20.0))
    on = GreenTrainer(rho=0.6).active(make.situation(components, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], costs=costs))
    everything = [c.name for c in components]
    assert on
    limit = 0.6 * costs.step_flops(everything, rows=1, tokens=1).total
    assert costs.step_flops(on, rows=1, tokens=1).total <= limit


def test_many_heads_stay_quick(make: Any) -> None:
    components = make.model(layers=12, heads=12)
    costs = make.costs(components, {c.name: 7.0 + i % 5 for i, c in enumerate(components)})
    scores = [float((i * 37) % 101) for i in range(len(components))]
    assert GreenTrainer(rho=0.5).active(make.situation(components, scores, costs=costs))


def test_it_needs_costs(make: Any) -> None:
    with pytest.raises(ConfigError, match="needs a cost model"):
        GreenTrainer().active(make.situation(make.flat(3)))
