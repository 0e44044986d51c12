"""A learning rate by rule, which follows how many passes over the data a run turns out to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rgft.learning_rate import usual_rate
from rgft.run import StepReport
from rgft.tasks.base import PreparedTask
from rgft.telemetry.run_folder import RunFolder
from tests.integration.test_search import HALF, UNLIMITED, prepared, run_of, same, weights  # noqa: F401

MEASURED: dict[str, Any] = {"budget": 0.5, "seed": 5}
EXAMPLES = 108  # of 120, a tenth is held out


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (UNLIMITED, {}),
        (UNLIMITED, {"accumulation": 2}),
        (UNLIMITED, {"batch_size": 36, "epochs": 6}),
        (HALF, {"epochs": 12}),
        (MEASURED, {"epochs": 12}),
    ],
)
def test_the_rate_is_that_of_the_passes_that_are_made(
    prepared: PreparedTask, config: dict[str, Any], settings: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    run = run_of(prepared, config, settings={"lr": "auto", **settings})
    peaks: list[float] = []
    run.observers.append(lambda report: peaks.append(run.optimizer.param_groups[0]["initial_lr"]))
    run.train()
    passes = run.guide.step_count * run.settings.batch_size * run.settings.accumulation / EXAMPLES
    assert passes > 1.5
    trained = run.guide.partition.share_above(run.guide.plan.cut)
    lowest, highest = (
        usual_rate(run.task.model, passes=passes * factor, steps=run.guide.step_count * factor, trained=trained)
        for factor in (1.15, 1 / 1.15)
    )
    assert lowest < run.lr < highest if trained else lowest == run.lr == highest
    assert peaks[-1] == pytest.approx(run.lr)
    assert run.search is None
    # It is settled once nothing is measured any more.
    assert len(set(peaks[len(peaks) // 4 :])) == 1
    run.close()


@pytest.mark.parametrize("stop_after", [3, 40])
def test_stopped_and_resumed_it_is_the_uninterrupted_run(
    prepared: PreparedTask, tmp_path: Path, stop_after: int  # noqa: F811
) -> None:  # fmt: skip
    """Also before the cut is known."""
    settings = {"lr": "auto", "epochs": 12}
    whole = run_of(prepared, MEASURED, settings=settings)
    was_measuring: list[bool] = []
    whole.observers.append(lambda report: was_measuring.append(whole.guide.is_measuring))
    whole.train()
    assert was_measuring[3]
    assert not was_measuring[40]
    with RunFolder.create(tmp_path / "run") as folder:
        first = run_of(prepared, MEASURED, settings=settings, folder=folder)

        def stop(report: StepReport) -> None:
            if report.step == stop_after:
                first.stop()

        first.observers.append(stop)
        first.train()
        first.close()
        second = run_of(prepared, MEASURED, settings=settings, folder=folder)
        second.resume()
        second.train()
    assert second.lr == whole.lr
    assert same(weights(second), weights(whole))
