"""Which rate and variant are chosen, and which runs that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from rgft.bench.experiment import Cell, Choice, Experiment
from rgft.bench.tasks import TASKS
from rgft.bench.tuning import Standing, Tuning, standing
from tests.unit.bench.test_experiment import contender, loaded


def tuned(experiment: Experiment, **losses: float) -> tuple[list[str], Choice | None]:
    """The runs that a tuning asks for, each done at once, and what it chooses; losses are by rate or variant."""
    made: dict[str, Standing] = {}
    tuning = Tuning(experiment, experiment.contenders[0], lambda cell: made.get(cell.file_name))
    steps = tuning.cells()
    try:
        while True:
            cell = next(steps)
            rate = f"lr{cell.lr:g}"
            loss = losses.get(
                rate if cell.variant is None else f"{cell.variant}-{rate}", losses.get(cell.variant or "")
            )
            if loss is not None:
                made[cell.file_name] = (loss + 0.001 * (cell.seed - 100),)
    except StopIteration as stop:
        return list(made), stop.value


def of(tmp_path: Path, *, seeds: tuple[int, ...] = (100,), max_extensions: int = 3, **changes: Any) -> Experiment:
    return loaded(
        tmp_path, contenders=[contender(**changes)], tuning_seeds=list(seeds), max_extensions=max_extensions
    )  # fmt: skip


def rates(found: list[str]) -> list[str]:
    return [name.split("--")[2] for name in found]


def test_the_best_rate_has_the_lowest_mean_validation_loss(tmp_path: Path) -> None:
    experiment = of(tmp_path, lrs=[1e-4, 2e-4, 4e-4], seeds=(100, 101))
    found, choice = tuned(experiment, **{"lr0.0001": 0.5, "lr0.0002": 0.4, "lr0.0004": 0.6})
    assert found[:2] == ["a--tuning--lr0.0001--seed100.json", "a--tuning--lr0.0001--seed101.json"]
    assert len(found) == 6
    assert choice == Choice(lr=2e-4)
    found, choice = tuned(experiment, **{"lr0.0001": 0.5, "lr0.0004": 0.6})
    assert choice is None
    assert standing(experiment, {"metrics": {"validation": {"loss": 0.5}, "test": {"loss": 0.1}}}) == (0.5,)
    assert standing(experiment, {"metrics": {}, "diverged": "step 3"}) == (inf,)


#: What CoLA's runs at three rates and with two seeds may show of validation data: Matthews (None: undefined) and loss
#: (None: diverged); and the rate that is best.
OF_COLA = {
    "best": ({1e-4: [(0.1, 0.5)] * 2, 2e-4: [(0.3, 0.7), (0.2, 0.7)], 4e-4: [(0.2, 0.6)] * 2}, 2e-4),
    "undefined": ({1e-4: [(0.1, 0.5)] * 2, 2e-4: [(0.9, 0.4), (None, 0.4)], 4e-4: [(0.0, 0.6)] * 2}, 1e-4),
    "equal": ({1e-4: [(0.2, 0.7)] * 2, 2e-4: [(0.2, 0.6)] * 2, 4e-4: [(0.1, 0.5)] * 2}, 2e-4),
    "none": ({1e-4: [(None, 0.7)] * 2, 2e-4: [(None, 0.6)] * 2, 4e-4: [(None, None)] * 2}, 2e-4),
}


@pytest.mark.parametrize(("shown", "best"), OF_COLA.values(), ids=OF_COLA)
def test_by_score_the_best_rate_has_the_best_one_and_of_equals_the_lowest_loss(
    tmp_path: Path, shown: dict[float, list[tuple[float | None, float | None]]], best: float
) -> None:
    experiment = of_cola(tmp_path, lrs=list(shown), seeds=[100, 101])

    def standing_of(cell: Cell) -> Standing:
        matthews, loss = shown[cell.lr][cell.seed - 100]
        given = {"matthews": matthews, "loss": loss}
        validation = {name: value for name, value in given.items() if value is not None}
        return standing(experiment, {"metrics": {"validation": validation}})

    assert chosen(experiment, standing_of) == Choice(lr=best)


def test_by_score_a_run_that_diverged_stands_behind_those_without_one(tmp_path: Path) -> None:
    experiment = of_cola(tmp_path, lrs=[1e-4, 2e-4], seeds=[100])
    diverged = standing(experiment, {"metrics": {}, "diverged": "step 3"})
    assert standing(experiment, {"metrics": {"validation": {"loss": 9.0}}}) < diverged
    assert chosen(experiment, lambda _: diverged) == Choice(lr=1e-4, has_diverged=True)


def test_a_score_of_which_less_is_better_is_chosen_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "cola", replace(TASKS["cola"], metric=lambda _: "top1_error"))
    experiment = of_cola(tmp_path, lrs=[1e-4], seeds=[100])
    low, high = (
        standing(experiment, {"metrics": {"validation": {"loss": 1.0 - error, "top1_error": error}}})
        for error in (0.2, 0.4)
    )
    assert low < high


def of_cola(tmp_path: Path, *, lrs: list[float], seeds: list[int]) -> Experiment:
    """An experiment with one contender, whose rates are chosen by Matthews."""
    return loaded(
        tmp_path, contenders=[contender(lrs=lrs)], tuning_seeds=seeds, task={"name": "cola"}, choose="score"
    )  # fmt: skip


def chosen(experiment: Experiment, standing_of: Callable[[Cell], Standing]) -> Choice | None:
    """What a tuning all of whose runs are done ends with."""
    cells = Tuning(experiment, experiment.contenders[0], standing_of).cells()
    try:
        while True:
            next(cells)
    except StopIteration as stop:
        return stop.value


def test_a_best_rate_at_an_edge_asks_for_the_next_one_beyond(tmp_path: Path) -> None:
    high = of(tmp_path, lrs=[1e-3, 2e-3, 3e-3])
    losses = {"lr0.001": 0.5, "lr0.002": 0.4, "lr0.003": 0.3, "lr0.0045": 0.2, "lr0.00675": 0.1, "lr0.0101": 0.2}
    found, choice = tuned(high, **losses)
    assert rates(found) == ["lr0.001", "lr0.002", "lr0.003", "lr0.0045", "lr0.00675", "lr0.0101"]
    assert choice == Choice(lr=6.75e-3)
    low = of(tmp_path, lrs=[1e-3, 2e-3, 3e-3])
    found, choice = tuned(low, **{"lr0.001": 0.3, "lr0.002": 0.4, "lr0.003": 0.5, "lr0.0005": 0.35})
    assert (rates(found)[3:], choice) == (["lr0.0005"], Choice(lr=1e-3))


def test_the_cap_ends_it(tmp_path: Path) -> None:
    losses = {"lr0.0001": 0.5, "lr0.0002": 0.4, "lr0.0004": 0.3, "lr0.0008": 0.2, "lr0.0016": 0.1}
    for cap, rate in ((0, 2e-4), (1, 4e-4), (3, 1.6e-3)):
        experiment = of(tmp_path, lrs=[1e-4, 2e-4], max_extensions=cap)
        assert tuned(experiment, **losses)[1] == Choice(lr=rate)
    lower = {"lr0.0001": 0.4, "lr0.0002": 0.5, "lr5e-05": 0.3}
    assert tuned(of(tmp_path, lrs=[2e-4, 1e-4], max_extensions=1), **lower)[1] == Choice(lr=5e-5)


def test_every_run_that_tuning_asks_for_is_known_before(tmp_path: Path) -> None:
    experiment = of(tmp_path, lrs=[1e-3, 2e-3, 3e-3], variants={"b": {}, "c": {}})
    known = {cell.file_name for cell in experiment.all_cells()}
    falling = {"lr0.001": 9.0, "lr0.002": 8.0, "lr0.003": 7.0, "lr0.0045": 6.0, "lr0.00675": 5.0, "lr0.0101": 4.0}
    rising = {"lr0.001": 7.0, "lr0.002": 8.0, "lr0.003": 9.0, "lr0.0005": 6.0, "lr0.00025": 5.0, "lr0.000125": 4.0}
    for losses, count in ((falling, 10), (rising, 10)):
        found, choice = tuned(experiment, **losses, b=0.5, c=0.4)
        assert choice is not None
        assert choice.variant == "c"
        assert len(found) == count, found
        final = experiment.final_cells(experiment.contenders[0], choice)
        assert {*found, *(cell.file_name for cell in final)} <= known


def test_rates_that_diverge_are_never_chosen(tmp_path: Path) -> None:
    experiment = of(tmp_path, lrs=[1e-4, 2e-4, 4e-4], max_extensions=1)
    assert tuned(experiment, **{"lr0.0001": 0.6, "lr0.0002": 0.5, "lr0.0004": inf})[1] == Choice(lr=2e-4)
    everywhere = {"lr0.0001": inf, "lr0.0002": inf, "lr0.0004": inf}
    assert tuned(experiment, **{**everywhere, "lr5e-05": 0.7})[1] == Choice(lr=5e-5)
    hopeless = tuned(experiment, **{**everywhere, "lr5e-05": inf})[1]
    assert hopeless is not None
    assert hopeless.has_diverged


@pytest.mark.parametrize("changes", [{"lrs": [1e-4]}, {"lrs": [1e-4, 2e-4], "settings": {"lr": "auto"}}])
def test_without_a_grid_nothing_is_extended(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, choice = tuned(of(tmp_path, **changes), **{"lr0.0001": 0.5, "lr0.0002": 0.4})
    assert len(found) == (0 if len(changes["lrs"]) == 1 else 2)
    assert choice == Choice(lr=changes["lrs"][-1])


def test_variants_are_tried_from_the_best_rate_to_their_own(tmp_path: Path) -> None:
    variants = {"two": {"config": {"policy": {"layers": 2}}}, "four": {"config": {"policy": {"layers": 4}, "seed": 1}}}
    settings = {"config": {"policy": {"name": "last_n", "layers": 1}, "seed": 8}}
    experiment = of(
        tmp_path, method="last_n", lrs=[1e-4, 2e-4, 4e-4], settings=settings, variants=variants, seeds=(100, 101)
    )  # fmt: skip
    losses = {"lr0.0001": 0.5, "lr0.0002": 0.4, "lr0.0004": 0.6}
    found, choice = tuned(experiment, **losses, two=0.5, four=0.3)
    assert found[6:] == [
        f"a--tuning--{variant}--lr{lr:g}--seed{seed}.json"
        for variant in variants
        for lr in (2e-4, 1e-4, 4e-4)
        for seed in (100, 101)
    ]
    assert choice == Choice(lr=2e-4, variant="four")
    slow = {"four-lr0.0004": 0.39, "four-lr0.0008": 0.37, "four-lr0.0016": 0.36, "four-lr0.0032": 0.38}
    found, climbed = tuned(experiment, **losses, two=0.5, four=0.4, **slow)
    assert [name.split("--")[3] for name in found if "four" in name][::2] == [
        "lr0.0002", "lr0.0001", "lr0.0004", "lr0.0008", "lr0.0016", "lr0.0032",
    ]  # fmt: skip
    assert climbed == Choice(lr=1.6e-3, variant="four")
    assert tuned(experiment, **losses, two=0.5, four=0.45)[1] == Choice(lr=2e-4)
    assert tuned(experiment, **losses, two=0.5)[1] is None
    a = experiment.contenders[0]
    assert a.settings_of("two") == {"config": {"policy": {"name": "last_n", "layers": 2}, "seed": 8}}
    assert a.settings_of("four") == {"config": {"policy": {"name": "last_n", "layers": 4}, "seed": 1}}
    assert a.settings_of(None) == settings
    other = of(
        tmp_path, method="last_n", settings=settings, variants={"lisa": {"config": {"policy": {"name": "lisa"}}}}
    )
    assert other.contenders[0].settings_of("lisa") == {"config": {"policy": {"name": "lisa"}, "seed": 8}}
    assert climbed is not None
    assert [cell.file_name for cell in experiment.final_cells(a, climbed)] == [
        f"a--final--four--lr0.0016--seed{seed}.json" for seed in (0, 1)
    ]


def test_one_rate_and_variants_are_tuned_too(tmp_path: Path) -> None:
    experiment = of(tmp_path, method="lora", lrs=[1e-4], variants={"two": {"rank": 2}})
    found, choice = tuned(experiment, **{"lr0.0001": 0.4, "two": 0.5})
    assert found == ["a--tuning--lr0.0001--seed100.json", "a--tuning--two--lr0.0001--seed100.json"]
    assert choice == Choice(lr=1e-4)
