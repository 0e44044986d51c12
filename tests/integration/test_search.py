"""A learning rate searched inside the budget, against runs that have it from the start of the search."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft import Config
from rgft.cli.preparing import prepare_task
from rgft.cli.request import read_request
from rgft.errors import ConfigError, NonFiniteError
from rgft.learning_rate import usual_rate
from rgft.run import Run, Settings, StepReport
from rgft.search import Search
from rgft.tasks.base import PreparedTask
from rgft.telemetry.run_folder import RunFolder
from tests.integration.cli_inputs import save_inputs

RATES = (1e-3, 4e-3, 1e-5)
SETTINGS: dict[str, Any] = {"lr": RATES, "epochs": 4, "batch_size": 2, "schedule": "constant", "warmup": 0.1}
UNLIMITED: dict[str, Any] = {"preset": "full", "seed": 5}
HALF: dict[str, Any] = {
    "budget": 0.25, "mask": {"name": "budget", "frozen_fraction": 0.5}, "probe": {"interval": 30, "size": 4}, "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedTask:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder, rows=120)
    return prepare_task(read_request(flags={"model": str(folder / "model"), "data": str(folder / "data.csv")}).settings)


def fresh(prepared: PreparedTask) -> PreparedTask:
    task = copy.copy(prepared)
    task.model = copy.deepcopy(prepared.model)
    return task


def run_of(prepared: PreparedTask, config: dict[str, Any], **changes: Any) -> Run:
    return Run(fresh(prepared), Config(**config), Settings(**{**SETTINGS, **changes.pop("settings", {})}), **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    run.close()
    return {name: value.clone() for name, value in run.task.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_winner_goes_on_as_if_it_had_been_alone(prepared: PreparedTask) -> None:
    searched = run_of(prepared, UNLIMITED)
    searched.train()
    search = searched.search
    assert search is not None
    assert search.rate in RATES
    assert [len(r.losses) for r in search.rounds] == [3, 2]
    assert search.rate == min(search.rounds[-1].losses, key=search.rounds[-1].losses.__getitem__)

    alone = run_of(prepared, UNLIMITED, settings={"lr": RATES[0]})
    begin = searched.guide.step_count - len(_steps_after_search(searched))

    def switch(report: StepReport) -> None:
        if report.step == begin:
            for group in alone.optimizer.param_groups:
                group["lr"] *= search.rate / RATES[0]
                group["initial_lr"] *= search.rate / RATES[0]
            alone.scheduler.base_lrs = [rate * search.rate / RATES[0] for rate in alone.scheduler.base_lrs]

    alone.observers.append(switch)
    alone.train()
    assert alone.guide.step_count == searched.guide.step_count == 216
    assert searched.guide.ledger.training_flops == pytest.approx(alone.guide.ledger.training_flops, rel=1e-12)
    assert same(weights(searched), weights(alone))


def _steps_after_search(run: Run) -> range:
    """Steps from the point on where the search began: a tenth of the run is its warm-up."""
    return range(run.guide.step_count - (-(-run.guide.step_count // 10)))


def test_what_losers_spend_is_part_of_the_budget(prepared: PreparedTask, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as folder:
        run = run_of(prepared, HALF, folder=folder)
        run.train()
    ledger, search = run.guide.ledger, run.search
    assert search is not None
    assert search.flops == ledger.search_flops > 0.0
    assert run.guide.plan.cut == 3
    assert 0.23 < run.guide.flops_fraction <= 0.25
    assert ledger.search_flops < 0.2 * ledger.spent_flops
    assert run.guide.summary()["flops"]["search"] == ledger.search_flops
    assert ledger.forward_cached_flops > 0.0  # all but the first candidate read what it computed
    records = folder.read_records()
    assert [r.step for r in records if r.type == "step"] == list(range(1, run.guide.step_count + 1))
    (found,) = [r.data for r in records if r.type == "search"]
    assert Search.from_dict({key: found[key] for key in ("rate", "rounds", "flops", "seconds", "joules")}) == search
    run.close()


def test_candidates_see_the_same_batches_and_dropout(prepared: PreparedTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before their first own step nothing tells them apart."""
    firsts: dict[float, float] = {}
    original = Run._advance

    def advance(run: Run, *arguments: Any, **options: Any) -> None:
        original(run, *arguments, **options)
        if run._withheld:
            rate = run.optimizer.param_groups[0]["initial_lr"]
            firsts.setdefault(rate, run._withheld[0].loss)

    monkeypatch.setattr(Run, "_advance", advance)
    run = run_of(prepared, UNLIMITED)
    run.train()
    run.close()
    assert len(firsts) == 3
    assert len(set(firsts.values())) == 1


@pytest.mark.parametrize(
    ("config", "stop_after"),
    [*((HALF, steps) for steps in (5, 16, 22, 60)), (UNLIMITED, 25), ({"budget": {"seconds": 1000.0}, "seed": 5}, 25)],
)
def test_stopped_and_resumed_it_is_the_uninterrupted_run(
    prepared: PreparedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], stop_after: int
) -> None:
    """Also in the middle of the search, which begins anew; and where the data, not the budget, says how far it is."""
    whole = run_of(prepared, config)
    whole.train()
    with RunFolder.create(tmp_path / "run") as folder:
        first = run_of(prepared, config, folder=folder)
        made = 0
        step = Run._step

        def stopping(run: Run, losses: Sequence[torch.Tensor], *times: float) -> None:
            nonlocal made
            step(run, list(losses), *times)
            made += 1
            if made == stop_after:
                run.stop()

        monkeypatch.setattr(Run, "_step", stopping)
        first.train()
        assert first.was_stopped
        first.close()
        second = run_of(prepared, config, folder=folder)
        second.resume()
        second.train()
        assert second.search is not None
        assert whole.search is not None
        assert second.search.rounds == whole.search.rounds
        assert [r.step for r in folder.read_records() if r.type == "step"] == list(range(1, whole.guide.step_count + 1))
    assert second.guide.ledger.spent_flops == whole.guide.ledger.spent_flops
    assert same(weights(second), weights(whole))


def test_a_diverging_candidate_is_dropped(prepared: PreparedTask) -> None:
    run = run_of(prepared, UNLIMITED, settings={"lr": (1e-3, 1e30)})
    run.train()
    assert run.search is not None
    assert run.search.rate == 1e-3
    assert run.search.rounds[0].losses[1e30] == float("inf")
    assert all(bool(torch.isfinite(value).all()) for value in weights(run).values())


def test_when_all_diverge_the_run_is_where_it_was(prepared: PreparedTask, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(prepared, UNLIMITED)
    before: dict[str, torch.Tensor] = {}
    advance = Run._advance

    def failing(self: Run, *arguments: Any, **options: Any) -> None:
        if self._withheld is not None:
            with torch.no_grad():
                next(self.task.model.parameters()).fill_(1.0)
            raise NonFiniteError("the loss is nan")
        advance(self, *arguments, **options)
        before.update({name: value.clone() for name, value in self.task.model.state_dict().items()})

    monkeypatch.setattr(Run, "_advance", failing)
    with pytest.raises(NonFiniteError, match=r"learning rates 1e-05, 0\.001, 0\.004 all diverged; search lower ones"):
        run.train()
    assert same(weights(run), before)


def test_a_run_too_short_for_a_search_says_so(
    prepared: PreparedTask, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    run = run_of(prepared, UNLIMITED, settings={"batch_size": 32})
    run.train()
    assert run.search is None
    assert "too few to search among 3 learning rates: trying 0.001" in caplog.text
    alone = run_of(prepared, UNLIMITED, settings={"batch_size": 32, "lr": 1e-3})
    alone.train()
    assert same(weights(run), weights(alone))


@pytest.mark.parametrize("lr", [0.0, (), (1e-3, 1e-3), (1e-3, -1.0), "best"])
def test_what_is_no_learning_rate_is_refused(lr: Any) -> None:
    with pytest.raises(ConfigError, match="lr: expected numbers > 0, each once, 'auto' or 'search', found"):
        Settings(lr=lr)


def test_search_tries_rates_around_the_rule_s(prepared: PreparedTask) -> None:
    run = run_of(prepared, UNLIMITED, settings={"lr": "search"})
    assert run.optimizer.param_groups[0]["initial_lr"] == run.lr == usual_rate(run.task.model)
    run.train()
    assert run.search is not None
    usual = usual_rate(run.task.model, passes=4.0)
    assert list(run.search.rounds[0].losses) == [usual / 2, usual, 2 * usual]
    assert run.search.rate == run.lr
    run.close()


def test_candidates_are_not_counted_in_a_memory_budget(prepared: PreparedTask) -> None:
    with pytest.raises(ConfigError, match="lr: expected one learning rate, or 'auto', with a memory budget, found"):
        run_of(prepared, {"budget": {"flops": 0.3, "memory": "1GB"}})
    assert not hasattr(prepared.model, "_rgft_guide")


def test_without_a_warm_up_the_plan_is_decided_before_the_search(prepared: PreparedTask) -> None:
    config = {"preset": "full", "policy": {"name": "last_n", "layers": 1}, "seed": 5}
    run = run_of(prepared, config, settings={"warmup": 0.0})
    before = {name: value.clone() for name, value in run.task.model.state_dict().items()}
    run.train()
    assert run.search is not None
    after = weights(run)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert not any(name.startswith(("bert.embeddings", "bert.encoder.layer.0.")) for name in changed)


def test_data_that_end_before_the_search_are_trained_on_once(prepared: PreparedTask) -> None:
    config = {"seed": 5, "warmup_fraction": 0.5}
    settings = {"accumulation": 64, "epochs": 1}
    searching = run_of(prepared, config, settings=settings)
    searching.train()
    alone = run_of(prepared, config, settings={**settings, "lr": 1e-3})
    alone.train()
    assert searching.search is None
    assert searching.guide.ledger.passes == alone.guide.ledger.passes
    assert same(weights(searching), weights(alone))
