"""The cut that a budget buys, against tables worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgft.allocation.base import Situation
from rgft.allocation.budget import BudgetMask
from rgft.allocation.compose import Composed
from rgft.allocation.peers.fixed import AllOn
from rgft.allocation.selection import readout_share
from rgft.components import Component
from rgft.error_map import ErrorMap
from rgft.errors import ConfigError
from rgft.plan import UpdatePlan

LAYERS = 4


class Costs:
    """A step costs 10 for F, 10 per depth that dX passes, and 5 of dW per depth that is on: 10 + 15·(depths on).

    Of F, the cache spares 2 for each depth below the cut, the embedding's aside.
    """

    def step_flops(self, active: frozenset[str], *, rows: int, tokens: int, cached_below: int = 0) -> Any:
        depths = {int(name) for name in active}
        forward = 10.0 - 2.0 * max(0, cached_below - 1)
        total = rows * tokens * (forward + 10.0 * (LAYERS + 2 - min(depths)) + 5.0 * len(depths))
        return type("Cost", (), {"total": total})


def components() -> tuple[Component, ...]:
    """An embedding at depth 0, layers 1…4, a classifier at depth 5; names are depths."""
    kinds = ["embedding", *["layer"] * LAYERS, "classifier"]
    return tuple(
        Component(name=str(d), kind=kind, slices=(), depth=d, layer=f"layers.{d}" if kind == "layer" else None)  # type: ignore[arg-type]
        for d, kind in enumerate(kinds)
    )


def measured(values: dict[int, float], *, count: int = 4, noise: float = 0.0) -> ErrorMap:
    """`count` observations value ± noise in turn."""
    error_map = ErrorMap.empty([c.name for c in components()])
    for i in range(count):
        scores = {str(d): v + (noise if i % 2 else -noise) for d, v in values.items()}
        error_map = error_map.observe(scores, step=i)
    return error_map


def situation(error_map: ErrorMap | None = None, **changes: Any) -> Situation:
    base = Situation(
        step=5, components=components(), error_map=error_map or measured({}), costs=Costs(),  # type: ignore[arg-type]
        flops_left=10_000.0, flops_allowed=12_000.0, batches=600, batches_per_epoch=200,
    )  # fmt: skip
    return replace(base, **changes)


def in_force(cut: int) -> UpdatePlan:
    return UpdatePlan(step=0, multipliers={c.name: float(c.depth >= cut) for c in components()}, cut=cut)


def test_steps_are_the_optimizers() -> None:
    """Four micro-batches a step: costs as before, steps a quarter as many, each four times as dear."""
    plain, accumulated = (BudgetMask().choices(situation(accumulation=number)) for number in (1, 4))
    assert [c.step_flops for c in accumulated] == [4 * c.step_flops for c in plain]
    assert [c.steps for c in accumulated] == pytest.approx([c.steps / 4 for c in plain])
    assert [c.cost for c in accumulated] == pytest.approx([c.cost for c in plain])
    # 60 FLOPs pay for a micro-batch above 3, and for no step.
    assert [c.cut for c in BudgetMask().choices(situation(flops_left=60.0, accumulation=4))] == [5]


def test_without_a_map_layers_count_alike() -> None:
    """r_d = 1 for each of the 4 layers, 0 for the embedding: bias from counts, variance from costs alone."""
    choices = BudgetMask().choices(situation())
    assert [c.cut for c in choices] == [0, 1, 2, 3, 4, 5]
    assert [c.step_flops for c in choices] == [100, 85, 70, 55, 40, 25]
    steps = [120, 12_000 / 85, 12_000 / 70, 12_000 / 55, 300, 480]
    assert [c.steps for c in choices] == pytest.approx(steps)
    # An epoch has 200 batches; repetitions are worth at most 0.7 of another.
    worth = [n if n <= 200 else 200 + 140 * (1 - math.exp(1 - n / 200)) for n in steps]
    assert [c.worth for c in choices] == pytest.approx(worth)
    bias = [(1 - k / 4) ** 3 for k in (4, 4, 3, 2, 1, 0)]
    variance = [120 / n for n in worth]
    assert [c.bias for c in choices] == pytest.approx(bias)
    assert [c.variance for c in choices] == pytest.approx(variance)
    costs = [b + v for b, v in zip(bias, variance, strict=True)]
    assert [c.cost for c in choices] == pytest.approx(costs)
    assert BudgetMask().cut(situation()) == costs.index(min(costs)) == 3
    assert BudgetMask().active(situation()) == {"3", "4", "5"}


def test_what_is_out_of_reach_may_count_for_more() -> None:
    for exponent, cut in ((1.0, 1), (2.0, 2)):
        mask = BudgetMask(bias_exponent=exponent)
        bias = [(1 - k / 4) ** exponent for k in (4, 4, 3, 2, 1, 0)]
        assert [c.bias for c in mask.choices(situation())] == pytest.approx(bias)
        assert mask.cut(situation()) == cut < BudgetMask().cut(situation())


def test_what_frozen_features_tell_already_is_not_missed() -> None:
    """Of layers 1 to 4; below a cut at 1 there is the embedding alone, which is not read."""
    unexplained = {1: 1.0, 2: 0.8, 3: 0.4, 4: 0.5}
    choices = BudgetMask().choices(situation(unexplained=unexplained))
    without = BudgetMask().choices(situation())
    bias = [(1 - k / 4) ** 3 for k in (4, 4, 3, 2, 1, 0)]
    missed = [1.0, 1.0, 1.0, 0.8, 0.4, 0.5]
    assert [c.bias for c in choices] == pytest.approx([b * u**3 for b, u in zip(bias, missed, strict=True)])
    assert [c.variance for c in choices] == [c.variance for c in without]
    assert BudgetMask().cut(situation()) == 3
    assert BudgetMask().cut(situation(unexplained=unexplained)) == 4
    assert BudgetMask().cut(situation(unexplained=dict.fromkeys(unexplained, 1.0))) == 3
    assert [c.bias for c in BudgetMask().choices(situation(unexplained={3: 0.4}))] == pytest.approx(
        [*bias[:4], bias[4] * 0.4**3, bias[5]]
    )


def test_a_first_map_has_to_better_what_the_readout_says() -> None:
    """Alone, this map would keep layer 3 on; features that tell the targets below it weigh more."""
    map_of = measured({1: 1, 2: 1, 3: 3, 4: 8})
    readout = {2: 0.9, 3: 0.3, 4: 0.9}
    assert BudgetMask().cut(situation(map_of)) == 3
    assert (
        BudgetMask().cut(situation(unexplained=readout))
        == BudgetMask().cut(situation(map_of, unexplained=readout))
        == 4
    )


def test_which_masks_want_a_readout() -> None:
    assert BudgetMask().readout_share == 0.08
    assert BudgetMask(readout=0.0).readout_share == 0.0
    assert BudgetMask(readout=0.01).readout_share == readout_share(Composed(mask=BudgetMask(readout=0.01))) == 0.01
    assert BudgetMask(readout=0.01, frozen_fraction=0.5).readout_share == 0.0
    assert readout_share(Composed()) == readout_share(AllOn()) == 0.0


def test_with_certain_maps_costs_follow_the_scores() -> None:
    """Observations without scatter are believed as they are."""
    r = {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.8, 4: 1.6, 5: 9.0}
    choices = BudgetMask(noise_weight=0.5).choices(situation(measured(r)))
    signal = [0.1, 0.2, 0.4, 0.8, 1.6]  # the classifier is on at every cut and does not count
    for choice in choices:
        assert choice.bias == pytest.approx((1 - sum(signal[choice.cut :]) / 3.1) ** 3)
        assert choice.variance == pytest.approx(120 / choice.worth)
        assert choice.cost == pytest.approx(choice.bias + 0.5 * choice.variance)


@pytest.mark.parametrize(
    ("r", "bare", "cut"),
    [
        ({1: 1, 2: 1, 3: 3, 4: 8}, 4, 3),  # .527 against .569: not a tenth less
        ({1: 1, 2: 1, 3: 1, 4: 8}, 4, 4),  # .491 against .572
        ({1: 4, 2: 2, 3: 1, 4: 1}, 2, 2),  # .825 against .987
    ],
)
def test_the_first_map_has_to_better_what_costs_alone_say(r: dict[int, float], bare: int, cut: int) -> None:
    """By costs alone layers 3 and 4 are on, from the table above."""
    assert BudgetMask().cut(situation()) == 3
    assert BudgetMask(hysteresis=0.0).cut(situation(measured(r))) == bare
    assert BudgetMask().cut(situation(measured(r))) == cut
    assert BudgetMask().cut(situation(measured(r), previous=in_force(bare))) == bare  # which is no first one


def test_uncertain_scores_count_for_less() -> None:
    """Scores of equal scatter are drawn towards the mean layer, the embedding's towards nothing."""
    values = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 5.0, 5: 1.0}
    error_map = measured(values, count=6, noise=1.0)
    error = error_map.uncertainty("4")
    assert error is not None
    exact = {d: error_map.value(str(d)) or 0.0 for d in range(5)}
    mean = sum(exact[d] for d in range(1, 5)) / 4
    share = 1 / (1 + (error / (0.5 * mean)) ** 2)
    believed = [exact[0] * share, *(mean + share * (exact[d] - mean) for d in range(1, 5))]
    choices = BudgetMask().choices(situation(error_map))
    for choice in choices:
        reached = sum(believed[choice.cut :]) / sum(believed)
        assert choice.bias == pytest.approx((1 - reached) ** 3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_observations_say_nothing_of_their_error_and_leave_layers_alike(count: int) -> None:
    once = measured({d: float(d**3) for d in range(6)}, count=count, noise=1e-3)
    for found, expected in zip(BudgetMask().choices(situation(once)), BudgetMask().choices(situation()), strict=True):
        assert found == expected


@given(st.integers(4, 60), st.floats(0.05, 5.0))
@settings(max_examples=60, deadline=None)
def test_more_certain_maps_with_all_signal_on_top_cut_no_lower(count: int, noise: float) -> None:
    """The longer a run has measured that only the top layer learns, the less it pays for the others."""
    values = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 4.0, 5: 1.0}
    mask = BudgetMask()
    less = mask.cut(situation(measured(values, count=count, noise=noise), flops_allowed=2_000.0))
    more = mask.cut(situation(measured(values, count=count * 4, noise=noise / 4), flops_allowed=2_000.0))
    assert 2 <= less <= more <= 4
    assert mask.cut(situation(measured(values), flops_allowed=2_000.0)) == 4


def test_signal_at_the_bottom_lowers_the_cut() -> None:
    r = {0: 0.5, 1: 4.0, 2: 1.0, 3: 0.1, 4: 0.1, 5: 1.0}
    assert BudgetMask().cut(situation(measured(r))) <= 1
    assert BudgetMask().cut(situation(measured(dict.fromkeys(r, 1.0)))) > 1


def test_below_an_epoch_only_ratios_of_steps_matter() -> None:
    small = BudgetMask().choices(situation(flops_allowed=500.0))
    large = BudgetMask().choices(situation(flops_allowed=4_000.0))
    assert [c.cost for c in small] == pytest.approx([c.cost for c in large])
    endless = BudgetMask().choices(situation(flops_allowed=1e7, batches=None, batches_per_epoch=None))
    assert [c.cost for c in endless] == pytest.approx([c.cost for c in large])


def test_where_repetitions_are_worth_nothing_a_budget_for_an_epoch_of_everything_cuts_nothing() -> None:
    """What a cut would save buys examples a second time, which average no noise away."""
    mask = BudgetMask(repetition=0.0)
    rich = mask.choices(situation(flops_allowed=20_000.0))
    assert {choice.worth for choice in rich} == {200}
    assert mask.cut(situation(flops_allowed=20_000.0)) <= 1
    cuts = [mask.cut(situation(flops_allowed=flops)) for flops in (10_000.0, 14_000.0, 17_000.0, 20_000.0)]
    assert cuts == sorted(cuts, reverse=True)


def test_a_run_that_a_budget_pays_for_whole_cuts_nothing() -> None:
    assert {choice.steps for choice in BudgetMask().choices(situation(flops_allowed=60_000.0))} == {600}
    assert BudgetMask().cut(situation(flops_allowed=60_000.0)) <= 1
    assert BudgetMask().cut(situation(flops_allowed=20_000.0, batches=100)) <= 1  # less than an epoch long


def test_the_more_epochs_a_budget_pays_for_the_less_is_cut() -> None:
    cuts = [BudgetMask().cut(situation(flops_allowed=epochs * 20_000.0, batches=100_000)) for epochs in (1, 2, 3, 5, 9)]
    assert cuts == sorted(cuts, reverse=True)
    assert cuts[0] > cuts[-1]
    assert cuts[-1] <= 1


def test_repetitions_are_worth_more_the_more_of_them_there_are_up_to_a_limit() -> None:
    assert [BudgetMask()._worth(steps, 200) for steps in (50.0, 200.0)] == [50.0, 200.0]
    for repetition in (0.2, 0.7, 1.0):
        mask = BudgetMask(repetition=repetition)
        worth = [mask._worth(float(steps), 200) for steps in range(200, 2_001, 200)]
        gains = [after - before for before, after in pairwise(worth)]
        assert gains == sorted(gains, reverse=True)
        assert 0 < gains[0] < 200 * repetition
        assert worth[-1] < 200 * (1 + repetition)
        assert mask._worth(1e9, 200) == pytest.approx(200 * (1 + repetition))
    first = BudgetMask(repetition=0.7)._worth(200.0 + 1e-6, 200) - 200.0
    assert first == pytest.approx(0.7e-6, rel=1e-3)


def test_from_a_cache_repetitions_are_cheaper_than_the_epoch() -> None:
    plain, cached = (BudgetMask().choices(situation(is_cached=cached)) for cached in (False, True))
    assert [c.step_flops for c in plain] == [c.step_flops for c in cached]
    assert plain[:3] == cached[:3]  # less than an epoch
    assert [c.steps for c in cached] == pytest.approx(
        [120, 12_000 / 85, 12_000 / 70, 200 + 1_000 / 51, 200 + 4_000 / 34, 600]
    )


def test_how_far_the_run_is_changes_nothing() -> None:
    early, late = (BudgetMask().choices(situation(flops_left=left)) for left in (12_000.0, 200.0))
    assert early == late


def test_cuts_of_which_no_step_is_paid_for_are_out_of_the_question() -> None:
    assert [c.cut for c in BudgetMask().choices(situation(flops_left=60.0))] == [3, 4, 5]
    assert [c.cut for c in BudgetMask().choices(situation(flops_left=3.0))] == [5]


def test_shapes_scale_costs() -> None:
    assert [c.step_flops for c in BudgetMask().choices(situation(rows=2, tokens=3))] == [600, 510, 420, 330, 240, 150]


def test_a_cut_above_which_repetitions_cost_nothing() -> None:
    class Free(Costs):
        def step_flops(self, active: frozenset[str], *, rows: int, tokens: int, cached_below: int = 0) -> Any:
            cost = super().step_flops(active, rows=rows, tokens=tokens)
            return type("Cost", (), {"total": 0.0}) if cached_below == LAYERS + 1 else cost

    last = BudgetMask().choices(situation(costs=Free(), is_cached=True))[-1]
    assert last.steps == 600
    endless = BudgetMask().choices(situation(costs=Free(), is_cached=True, batches=None))[-1]
    assert (endless.steps, endless.worth) == (math.inf, 340.0)
    assert math.isfinite(endless.cost)


@pytest.mark.parametrize(("hysteresis", "expected"), [(0.0, 3), (0.5, 2)])
def test_hysteresis_keeps_the_cut_in_force_unless_another_is_clearly_better(hysteresis: float, expected: int) -> None:
    table = {c.cut: c.cost for c in BudgetMask().choices(situation())}
    assert 1 > table[3] / table[2] > 0.5
    mask = BudgetMask(hysteresis=hysteresis)
    assert mask.cut(situation(previous=in_force(2))) == expected
    assert mask.cut(situation(previous=None)) == 3


def test_hysteresis_at_its_edge() -> None:
    table = {c.cut: c.cost for c in BudgetMask().choices(situation())}
    edge = 1 - table[3] / table[2]
    assert BudgetMask(hysteresis=edge - 1e-6).cut(situation(previous=in_force(2))) == 3
    assert BudgetMask(hysteresis=edge + 1e-6).cut(situation(previous=in_force(2))) == 2


@pytest.mark.parametrize(
    ("fraction", "cut"), [(0.0, 0), (0.1, 0), (0.2, 2), (0.25, 2), (0.5, 3), (0.75, 4), (0.9, 5), (1.0, 5)]
)
def test_frozen_fraction_rounds_to_layers(fraction: float, cut: int) -> None:
    """Of 4 layers; the layer of depth d is frozen below cut d+1. Neither map nor budget is asked."""
    mask = BudgetMask(frozen_fraction=fraction)
    assert mask.cut(situation()) == cut
    assert mask.cut(situation(costs=None, flops_left=None)) == cut
    assert mask.active(situation()) == {str(d) for d in range(cut, 6)}


def test_without_costs_or_layers_the_cut_in_force_stays() -> None:
    assert BudgetMask().cut(situation(costs=None)) == 0
    assert BudgetMask().cut(situation(flops_left=None, previous=in_force(3))) == 3
    flat = tuple(replace(c, layer=None) for c in components())
    assert BudgetMask().choices(situation(components=flat)) == []
    assert BudgetMask(frozen_fraction=0.5).cut(situation(components=flat)) == 0


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        BudgetMask(
            bias_exponent=0.5,
            noise_weight=-1.0,
            repetition=1.5,
            spread=-0.1,
            hysteresis=1.0,
            frozen_fraction=1.5,
            readout=1.0,
        )
    for key in ("bias_exponent", "noise_weight", "repetition", "spread", "hysteresis", "frozen_fraction", "readout"):
        assert f"mask.{key}: expected" in str(caught.value)
