"""Memory budgets: each choice in turn, held against what steps really hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from rgft import Budget, Config, Guide
from rgft.batches import BatchStream
from rgft.cost.memory import step_memory
from rgft.cost.peak import PeakMemory
from rgft.errors import BudgetError
from rgft.integrations import enable
from rgft.plan import MemoryPlan, RunPlan
from rgft.run import Run
from rgft.telemetry.flop_counter import flop_counter
from rgft.telemetry.run_folder import RunFolder
from tests.families import FAMILIES
from tests.integration.limited import (
    ROWS,
    FamilyTask,
    accumulated,
    distance,
    limited,
    planned,
    staircase,
)
from tests.integration.loops import Examples, adamw, collate, guided, without_dropout
from tests.integration.trainers import make_trainer


def follow(run: Run, steps: int = 3) -> tuple[int, int]:
    """(peak of all that tensors hold, `step_memory`) of steps with the run's own passes."""
    guide, settings = run.guide, run.settings
    batches = iter(guide.batches(
        run.task.train, batch_size=settings.batch_size, collate_fn=run.task.collate, epochs=settings.epochs
    ))  # fmt: skip

    def step() -> None:
        run._passes(next(batches))
        guide.step(run.optimizer)
        run.optimizer.zero_grad()

    run.task.model.train()
    step()
    memory = step_memory(run.task.model, run.optimizer, step).total
    with PeakMemory(guide.kept_tensors(), beside=guide.cache.bytes if guide.cache else 0) as peak:
        for _ in range(steps):
            step()
    return peak.peak, memory


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def stairs(request: pytest.FixtureRequest) -> tuple[str, tuple[MemoryPlan, ...]]:
    return request.param, staircase(request.param)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_each_choice_comes_in_its_turn(name: str) -> None:
    # Means of the weights make the deepest cut worth its while in both.
    plans = staircase(name, update={"average_last": 0.3})
    assert (plans[0].rows_per_pass, plans[0].checkpointing, plans[0].lowest_cut, plans[0].choices) == (
        ROWS,
        False,
        0,
        (),
    )
    order = [(plan.lowest_cut, plan.checkpointing, -plan.rows_per_pass) for plan in plans]
    # At every cut smaller passes come before checkpointing, and a deeper cut after both.
    assert order == sorted(order)
    assert [plan.needed for plan in plans] == sorted((plan.needed for plan in plans), reverse=True)
    assert (0, False, -4) in order
    assert any(plan.checkpointing and plan.lowest_cut == 0 for plan in plans)
    layers = {"bert": 2, "gpt2": 3}[name]
    assert {plan.lowest_cut for plan in plans} >= {0, layers}
    said = " ".join(choice for plan in plans for choice in plan.choices)
    assert all(part in said for part in ("gradients accumulated", "gradient checkpointing", "nothing below depth"))


def test_what_steps_hold_stays_below_the_limit(stairs: tuple[str, tuple[MemoryPlan, ...]]) -> None:
    name, plans = stairs
    for plan in plans:
        run = limited(name, plan.needed, task=FamilyTask(name))
        again = run.prepare().memory
        assert again is not None
        assert (again.parts, again.needed, again.limit) == (plan.parts, plan.needed, plan.needed)
        peak, memory = follow(run)
        run.close()
        assert peak <= plan.needed
        assert memory <= plan.needed
        assert peak >= 0.5 * plan.needed  # a forecast that is far too high would refuse what fits


@pytest.mark.parametrize(("name", "budget"), [("bert", {"flops": 0.3}), ("gpt2", {})])
def test_whole_runs_stay_below_the_limit(name: str, budget: dict[str, Any]) -> None:
    """Measuring, probes, decisions, the cache and the mean of the last iterates included."""
    plans = staircase(name)
    for limit in {plans[0].needed, plans[len(plans) // 2].needed, plans[-1].needed}:
        run = limited(name, limit, epochs=6, budget=budget, probe={"interval": 4, "size": 4})
        run.train()
        summary = run.guide.summary()
        memory = summary["memory"]
        assert memory["limit_bytes"] == limit
        assert 0.4 * memory["forecast_bytes"] < memory["measured_bytes"] <= limit
        assert memory["is_within"] is True
        assert run.guide.step_count > 3
        if budget:
            assert summary["flops"]["fraction_of_full"] <= 0.3 * 1.001
        run.close()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_smaller_passes_make_the_same_gradient(name: str) -> None:
    measuring = {"warmup_fraction": 0.9}  # everything on
    plans = [plan for plan in staircase(name, has_dropout=False, **measuring) if plan.lowest_cut == 0]
    batch = collate([FamilyTask(name).train[i] for i in range(ROWS)])
    gradients = {}
    for limit in ("1TB", plans[1].needed, next(plan.needed for plan in plans if plan.checkpointing)):
        task = FamilyTask(name)
        without_dropout(task.model)
        run = limited(name, limit, task=task, **measuring)
        plan = run.prepare().memory
        assert plan is not None
        run.task.model.train()
        gradients[plan.rows_per_pass, plan.checkpointing] = accumulated(run, batch)
        run.close()
    whole = gradients.pop((ROWS, False))
    assert {is_checkpointed for _, is_checkpointed in gradients} == {False, True}
    assert all(rows < ROWS for rows, _ in gradients)
    for found in gradients.values():
        assert distance(found, whole) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_where_nothing_fits_the_number_is_true(name: str) -> None:
    with pytest.raises(BudgetError) as caught:
        planned(name, 1000)
    message = str(caught.value)
    weights = sum(p.nbytes for p in FAMILIES[name].build().parameters())
    assert "that train only the top 0" not in message
    assert message.startswith("the memory budget of 1 KB (1000 bytes) holds no plan of this run, whose weights alone")
    least = int(re.search(r"\((\d+) bytes\): passes of \d × 16", message)[1])  # type: ignore[index]
    assert least > weights
    plan = planned(name, least)
    assert plan.needed == least
    assert plan == staircase(name)[-1] or plan.needed == staircase(name)[-1].needed
    with pytest.raises(BudgetError, match=str(least)):
        planned(name, int(0.99 * least))


def test_measuring_and_deciding_stay_above_the_lowest_cut() -> None:
    limit = next(plan.needed for plan in staircase("bert") if plan.lowest_cut == 2)
    run = limited("bert", limit, epochs=6, probe={"interval": 3, "size": 4})
    run.prepare()
    guide = run.guide
    below = {c.name for c in guide.partition if c.depth < 2}
    before = {n: p.detach().clone() for n, p in run.task.model.named_parameters()}
    assert guide.plan.cut == 2
    assert not below & set(guide.plan.active())
    assert guide.situation().lowest_cut == 2
    run.train()
    assert guide.plans
    assert all(plan.cut >= 2 for plan in guide.plans)
    off = {parameter for c in guide.partition if c.name in below for parameter in guide._binding.parameters[c.name]}
    assert off
    assert not any(parameter in run.optimizer.state for parameter in off)  # moments only of what was ever on
    assert all(torch.equal(p, before[n]) for n, p in run.task.model.named_parameters() if p in off)
    run.close()


@pytest.mark.parametrize("preset", ["full", "proposal_b"])
def test_training_that_decides_nothing_keeps_to_the_cut(preset: Any) -> None:
    limit = next(plan.needed for plan in staircase("bert", preset=preset) if plan.lowest_cut)
    run = limited("bert", limit, preset=preset)
    run.train()
    lowest = run.guide.run_plan.memory.lowest_cut  # type: ignore[union-attr]
    assert lowest >= 1
    assert run.guide.plan.cut == lowest
    assert run.guide.summary()["memory"]["is_within"] is True
    run.close()


def test_a_policy_that_may_turn_on_anything_is_refused() -> None:
    limit = staircase("bert")[-1].needed
    for config in ({"mask": {"name": "energy", "rho": 0.5}}, {"policy": "lisa"}):
        with pytest.raises(BudgetError, match=r"may turn it on; use mask 'budget', or a limit of at least .* bytes\)"):
            planned("bert", limit, **config)
    with pytest.raises(BudgetError, match=r"stability.always_on asks for 'bert.embeddings'"):
        planned("bert", limit, stability={"always_on": ("embedding",)})


def test_a_cut_fixed_by_hand_is_all_that_must_fit() -> None:
    fixed = {"mask": {"name": "budget", "frozen_fraction": 0.5}, "warmup_fraction": 0.0, "probe": {"interval": 0}}
    everything, half = planned("bert", "1TB"), planned("bert", "1TB", **fixed)
    assert (half.lowest_cut, half.choices) == (2, ())
    assert half.needed < 0.7 * everything.needed


def test_probes_are_smaller_or_off() -> None:
    sizes = [plan.probe_size for plan in staircase("bert")]
    assert sizes[0] == 64
    assert sizes[-1] == 0
    run = limited("bert", staircase("bert")[-1].needed, epochs=6, probe={"interval": 3, "size": 4})
    plan = run.prepare()
    assert plan.probes == plan.probe_size == 0
    assert any(choice.startswith("no probes") for choice in plan.memory.choices)  # type: ignore[union-attr]
    run.train()
    assert run.guide.ledger.probes == 0
    run.close()


def test_the_cache_gets_what_is_left() -> None:
    fixed = {"mask": {"name": "budget", "frozen_fraction": 0.5}, "warmup_fraction": 0.0, "probe": {"interval": 0}}
    needed = planned("bert", "1TB", **fixed).needed
    state = 16 * 32 * 4  # of an example without padding
    held = {}
    for room in (0, 5 * state, 10**9):
        run = limited("bert", needed + room, **fixed)
        run.train()
        held[room] = run.guide.cache.bytes  # type: ignore[union-attr]
        run.close()
    assert held[0] == 0
    assert 4 * state < held[5 * state] <= 5 * state
    assert held[10**9] > 20 * state


def test_a_loop_that_makes_its_own_batches_is_told_what_would_fit() -> None:
    def guide(memory: int | str) -> Guide:
        guide = Guide(FAMILIES["bert"].build(), Config(budget=Budget(memory=memory), seed=3))
        guide.prepare(BatchStream(Examples(FAMILIES["bert"], 40, 16), batch_size=24, collate_fn=collate, epochs=3))
        return guide

    def plan_of(memory: int | str) -> MemoryPlan:
        with guide(memory) as made:
            assert made.run_plan is not None
            assert made.run_plan.memory is not None
            return made.run_plan.memory

    plans, message = [plan_of("1TB")], ""
    while not message:
        try:
            plans.append(plan_of(plans[-1].needed - 1))
        except BudgetError as error:
            message = str(error)
    assert re.search(r"With batches of at most \d+ rows it would hold passes of \d+ × 16", message)
    assert {plan.rows_per_pass for plan in plans} == {24}
    assert [plan.lowest_cut for plan in plans] == sorted(plan.lowest_cut for plan in plans)
    assert (plans[1].checkpointing, plans[1].lowest_cut) == (True, 0)
    deeper = [plan for plan in plans if plan.lowest_cut]
    assert deeper
    for plan in deeper:
        assert re.match(r"a loop that makes batches of at most \d+ rows could have passes of", plan.choices[-1])


def test_checkpointing_is_taken_back_and_counted_twice() -> None:
    plans = staircase("bert", preset="full")
    limit = next(plan.needed for plan in plans if plan.checkpointing and plan.lowest_cut == 0)
    run = limited("bert", limit, preset="full")
    plain = limited("bert", "1TB", preset="full")
    for each in (run, plain):
        each.prepare()
    assert run.guide.run_plan.memory.checkpointing  # type: ignore[union-attr]
    run.train()
    plain.train()
    flops, same = run.guide.summary()["flops"], plain.guide.summary()["flops"]
    assert flops["recomputed"] > 0.2 * flops["forward"]
    assert flops["spent"] == pytest.approx(same["spent"] + flops["recomputed"])
    assert same["recomputed"] == 0.0
    assert run.guide.ledger.audits == 0
    assert any(getattr(m, "gradient_checkpointing", False) for m in run.task.model.modules())
    run.close()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in run.task.model.modules())


@pytest.mark.parametrize("cut", [0, 2])
def test_what_checkpointing_computes_twice_is_modelled(cut: int) -> None:
    """By counting; from above, as what nothing reads in backward is not computed again."""
    limit = next(p.needed for p in staircase("gpt2", preset="full") if p.checkpointing and p.lowest_cut == cut)
    run = limited("gpt2", limit, preset="full")
    plan = run.prepare().memory
    assert plan is not None
    assert (plan.checkpointing, plan.lowest_cut) == (True, cut)
    run.task.model.train()
    batch = collate([run.task.train[i] for i in range(ROWS)])
    with flop_counter() as counter:
        run._passes(batch)
    ledger = run.guide.ledger
    plain = ledger.spent_flops - ledger.recomputed_flops
    assert plain < 0.9 * counter.get_total_flops()
    assert counter.get_total_flops() <= ledger.spent_flops <= 1.1 * counter.get_total_flops()
    run.close()


def test_models_that_came_with_checkpointing_keep_their_own() -> None:
    task = FamilyTask("bert")
    task.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in task.model.modules()]
    run = limited("bert", "1TB", task=task)
    assert run.prepare().memory.checkpointing  # type: ignore[union-attr]
    run.train()
    run.close()
    assert functions == [getattr(m, "_gradient_checkpointing_func", None) for m in task.model.modules()]
    assert any(getattr(m, "gradient_checkpointing", False) for m in task.model.modules())


def test_batch_normalisation_is_not_split() -> None:
    plans = staircase("resnet", preset="full")
    assert {plan.rows_per_pass for plan in plans} == {ROWS}
    assert len(plans) > 1


def test_a_resumed_run_keeps_its_choices(tmp_path: Path) -> None:
    limit = next(plan.needed for plan in staircase("bert") if plan.rows_per_pass == 2)
    whole = limited("bert", limit)
    whole.train()
    whole.close()
    with RunFolder.create(tmp_path / "run") as folder:
        first = limited("bert", limit)
        first.folder = folder
        first.observers.append(lambda report: first.stop() if report.step == 4 else None)
        first.train()
        first.close()
        chosen = first.guide.run_plan
        for is_prepared in (False, True):
            again = limited("bert", limit)
            again.folder = folder
            if is_prepared:
                again.prepare()
            assert again.resume() == 4
            # Whatever would be chosen anew, on another machine:
            assert again.guide._memory is not None
            assert again.guide._memory.plan == chosen.memory  # type: ignore[union-attr]
            if is_prepared:
                again.train()
                assert again.guide.run_plan.memory == chosen.memory  # type: ignore[union-attr]
            again.close()
    trained = dict(again.task.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in whole.task.model.named_parameters())
    assert RunPlan.from_dict(chosen.to_dict()) == chosen  # type: ignore[union-attr]


def test_a_budget_of_memory_alone_changes_nothing_where_everything_fits() -> None:
    torch.manual_seed(0)
    states = []
    for config in ({}, {"budget": Budget(memory="1TB")}):
        guide = Guide(FAMILIES["bert"].build(), Config(seed=3, **config))
        torch.manual_seed(0)
        guided(guide, adamw(guide), Examples(FAMILIES["bert"], 40), epochs=2)
        states.append({n: p.detach().clone() for n, p in guide.model.named_parameters()})
        guide.detach()
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_trainer_keeps_to_it_with_its_own_batches(tmp_path: Path) -> None:
    def engaged(memory: int | str) -> tuple[Any, Guide, MemoryPlan]:
        trainer = make_trainer(tmp_path)
        guide = enable(trainer, budget={"memory": memory, "flops": 0.5})
        assert guide.run_plan is not None
        assert guide.run_plan.memory is not None
        return trainer, guide, guide.run_plan.memory

    def is_checkpointing(model: torch.nn.Module) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(is_checkpointing(kwargs["model"]))

    _, _, whole = engaged("1TB")
    trainer, guide, plan = engaged(int(0.8 * whole.needed))
    assert (plan.rows, plan.rows_per_pass, plan.checkpointing) == (8, 8, True)
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) > 3
    assert all(seen)
    assert guide.ledger.recomputed_flops > 0.0
    assert guide.flops_fraction <= 0.5
    assert not is_checkpointing(trainer.model)
