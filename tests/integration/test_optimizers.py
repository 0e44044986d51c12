"""Every optimizer that is known by name keeps what RGFT promises of AdamW."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from rgft import Config, Guide
from rgft.errors import ConfigError, OptimizerError
from rgft.optimizer import KINDS, MuonAdamW, newton_schulz_flops
from rgft.optimizer.dry_step import dry_step
from rgft.optimizer.state_bytes import state_bytes
from rgft.signals.base import GradientSignal
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, assert_same_state, changed, collate, guided, weights_of
from tests.integration.policies import Scripted, steer
from tests.integration.test_guide_resume import assert_equal

PACKAGES = {"lion": "lion_pytorch", "schedule-free": "schedulefree", "adamw-8bit": "bitsandbytes"}
RATES = {"sgd": 0.05, "adafactor": 0.1, "lion": 3e-3}
NAMES = list(KINDS)
BERT = FAMILIES["bert"]
WHOLE = {"adafactor", "muon", "adamw-8bit"}


def optimizer_of(guide: Guide, name: str, *, factor: float = 1.0, weight_decay: float = 0.1) -> Optimizer:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    optimizer = guide.make_optimizer(name, lr=factor * RATES.get(name, 3e-3), weight_decay=weight_decay)
    if name == "adamw-8bit":
        optimizer.args.min_8bit_size = 256  # type: ignore[attr-defined]  # the model is small
    return optimizer


def settings(**more: Any) -> dict[str, Any]:
    return {"update": {"average_last": 0.0, **more.pop("update", {})}, **more}


def measured_guide(name: str, **more: Any) -> tuple[Guide, Optimizer]:
    """The preset `rgft`, whose signal scores the optimizer's steps."""
    guide = Guide(BERT.build(), Config(**settings(**more)))
    return guide, optimizer_of(guide, name)


# ---------------------------------------------------------------- plain


def plain_optimizers(name: str, model: torch.nn.Module, lr: float) -> list[Optimizer]:
    """As users make them without RGFT."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    if name == "muon":
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "encoder.layer" in n]
        others = [p for p in weights if not any(p is h for h in hidden)]
        assert tables <= {id(p) for p in others}
        groups = [{"params": others, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        return [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=lr, fused=True),
        ]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = KINDS[name].build([{"lr": lr, **group} for group in groups], lr)
    if name == "adamw-8bit":
        optimizer.args.min_8bit_size = 256  # type: ignore[attr-defined]
    return [optimizer]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_with_everything_on_it_is_the_plain_optimizer_bit_for_bit(name: str, accumulation: int) -> None:
    guide = Guide(BERT.build(), Config(preset="full"))
    optimizer = optimizer_of(guide, name)
    model = BERT.build()
    oracles = plain_optimizers(name, model, RATES.get(name, 3e-3))
    torch.manual_seed(3)
    batches, _ = guided(guide, optimizer, Examples(BERT), epochs=2, accumulation=accumulation)
    torch.manual_seed(3)
    for position, batch in enumerate(batches, start=1):
        (loss_of(model, batch) / accumulation).backward()
        if position % accumulation == 0:
            for oracle in oracles:
                oracle.step()
                oracle.zero_grad()
    if KINDS[name].is_schedule_free:
        oracles[0].eval()  # type: ignore[attr-defined]
    guide.detach()
    assert_same_state(guide.model, model)


@pytest.mark.parametrize("name", NAMES)
def test_a_multiplier_of_two_is_twice_the_learning_rate(name: str) -> None:
    ends = []
    for factor, multiplier in ((1.0, 2.0), (2.0, 1.0)):
        guide = Guide(BERT.build(), Config(preset="full"))
        names = guide.partition.names
        steer(guide, Scripted(lambda s, on=names: set(on), dict.fromkeys(names, multiplier)))
        torch.manual_seed(3)
        guided(guide, optimizer_of(guide, name, factor=factor), Examples(BERT), epochs=1)
        guide.detach()
        ends.append(guide.model)
    assert_same_state(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(name: str) -> None:
    guide, optimizer = measured_guide(name, warmup_fraction=0.1)
    _, losses = guided(guide, optimizer, Examples(BERT, count=24), epochs=12, clip=1.0)
    assert guide._decisions.has_decided
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


# ---------------------------------------------------------------- off


@pytest.mark.parametrize("moments", ["keep", "decay", "reset", "offload"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_off_keeps_every_bit(name: str, moments: str) -> None:
    """On for two steps, off for two, on again: weights while off, and what the mode leaves of the state."""
    guide = Guide(BERT.build(), Config(signal="grad_norm", scaling=None, **settings(update={"moments": moments})))
    names = guide.partition.names
    victims = set(names[1::2])
    steer(guide, Scripted(lambda s: set(names) - (victims if s.step in (2, 3) else set())))
    optimizer = optimizer_of(guide, name)
    before = weights_of(guide)
    kept: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []

    def state(p: Tensor) -> dict[str, Any]:
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}

    def check(guide: Guide) -> None:
        nonlocal before, groups
        moved = changed(guide, before)
        step = guide.step_count - 1
        held = {id(p): state(p) for v in sorted(victims) for p in guide._binding.parameters[v]}
        if step == 1:
            kept.update(held)
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if step in (2, 3):
            assert not moved & victims
            if moments == "reset":
                assert not any(held.values())
            else:
                assert_equal(held, kept)
            for group, then in zip(optimizer.param_groups, groups, strict=True):
                owners = {guide._binding.owner(p) for p in group["params"]}
                if owners <= victims and moments != "reset":
                    assert {k: v for k, v in group.items() if k != "params"} == then
        elif step == 4:
            assert len(moved & victims) == len(victims)
        before = weights_of(guide)

    guided(guide, optimizer, Examples(BERT), steps=6, after_step=check)
    assert guide.step_count == 6


def test_decay_is_what_gradients_of_zero_do() -> None:
    """Of each optimizer the library's own step says so."""
    for name in NAMES:
        if name in PACKAGES and not _is_installed(PACKAGES[name]):
            continue
        guide = Guide(BERT.build(), Config(preset="full"))
        optimizer = optimizer_of(guide, name, weight_decay=0.0)
        guided(guide, optimizer, Examples(BERT), steps=2)
        from rgft.execution.moments import Moments

        oracle_state = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        component = guide.partition.names[1]
        moments = Moments(optimizer, guide._binding, "decay")
        moments._decay(component, 3)
        decayed = {p: copy.deepcopy(optimizer.state[p]) for p in guide._binding.parameters[component]}
        optimizer.state.update(oracle_state)
        guide._executor._multipliers.detach()  # type: ignore[union-attr]
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        for parameter, state in decayed.items():
            for key, value in state.items():
                if key in ("step", "z") or not isinstance(value, Tensor) or value.dtype == torch.uint8:
                    continue
                expected = optimizer.state[parameter][key]
                # Blocks of bytes are quantised anew at each step.
                rtol = 0.03 if key.startswith("absmax") else 1e-4
                assert torch.allclose(value, expected, rtol=rtol, atol=1e-12), f"{name}: {key}"


def _is_installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------- resuming


class Session:
    def __init__(self, name: str, seed: int = 0) -> None:
        # Of so small a model Muon's products cost as much as the passes.
        more = {"probe": {"interval": 3, "size": 2}, "budget": None if name == "muon" else 0.7, "seed": 3,
                "warmup_fraction": 0.5, "mask": {"frozen_fraction": 0.5}}  # fmt: skip
        self.model = BERT.build(seed)
        self.guide = Guide(self.model, Config(**settings(**more)))
        self.optimizer = optimizer_of(self.guide, name)
        self.scheduler = self.guide.scheduler(self.optimizer, shape="constant")

    def run(self, until: int) -> None:
        for batch in self.guide.batches(Examples(BERT), batch_size=4, collate_fn=collate, epochs=2.0):
            self.guide.loss(batch).backward()
            self.guide.step(self.optimizer, self.scheduler)
            self.optimizer.zero_grad()
            if self.guide.step_count == until:
                return

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = ("model", "optimizer", "scheduler", "guide")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        for part, state in torch.load(file, weights_only=True).items():
            getattr(self, part).load_state_dict(state)

    def end(self) -> dict[str, Any]:
        guide = self.guide.state_dict()
        del guide["spending"]
        return {"weights": dict(self.model.state_dict()), "guide": guide, "optimizer": self.optimizer.state_dict()}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(7)
    whole = Session(name)
    whole.run(9)
    expected = whole.end()
    assert whole.guide.step_count >= 8
    assert whole.guide.ledger.probes >= 2
    for step in (1, 7):
        torch.manual_seed(7)
        first = Session(name)
        first.run(step)
        assert first.guide.is_measuring == (step == 1)
        saved = first.save()
        torch.manual_seed(99)
        second = Session(name, seed=5)
        second.load(saved)
        second.run(9)
        assert_equal(second.end(), expected, f"after step {step}: ")


# ---------------------------------------------------------------- the signal


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_steps_that_were_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Without decay, the score of a step on a batch is ⟨g, θ_before − θ_after⟩: of its own, and of the next one."""
    whole = settings(probe={"row_stride": 1, "interval": 1, "size": 0}, scaling=None, warmup_fraction=0.9)
    guide = Guide(BERT.build(), Config(**whole))
    optimizer = optimizer_of(guide, name, weight_decay=0.0)
    measurement = guide._measurement
    assert measurement is not None
    scored: list[dict[str, float]] = []
    original = GradientSignal.score

    def noting(*args: Any) -> dict[str, float]:
        scored.append(original(*args))
        return scored[-1]

    monkeypatch.setattr(GradientSignal, "score", noting)

    def values() -> dict[str, list[Tensor]]:
        return {
            c.name: [optimizer.state.get(p, {}).get("z", p).detach().clone() for p in held]
            for c, held in guide._binding
        }

    moved: dict[str, list[Tensor]] = {}
    for batch in guide.batches(Examples(BERT), batch_size=4, collate_fn=collate, epochs=1):
        guide.loss(batch).backward()
        gradients = {
            c.name: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in held]
            for c, held in guide._binding
        }
        last, before = moved, values()
        scored.clear()
        guide.step(optimizer)
        optimizer.zero_grad()
        after = values()
        moved = {n: [b - a for b, a in zip(before[n], after[n], strict=True)] for n in before}
        for scores, steps in zip(scored, [last, moved] if last else [{}, moved], strict=True):
            assert set(scores) >= (guide.active if steps else set())
            for component, score in scores.items():
                parts = zip(gradients[component], steps[component], strict=True)
                sizes = [(float((g * s).sum()), float((g * s).abs().sum())) for g, s in parts]
                expected, size = (sum(column) for column in zip(*sizes, strict=True))
                assert score == pytest.approx(expected, abs=3e-3 * size), component


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_step_is_the_step_and_moves_nothing(name: str) -> None:
    guide = Guide(BERT.build(), Config(preset="full"))
    optimizer = optimizer_of(guide, name, weight_decay=0.0)
    guided(guide, optimizer, Examples(BERT), steps=2)
    if KINDS[name].is_schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    frozen = copy.deepcopy({"state": optimizer.state_dict(), "weights": guide.model.state_dict()})
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    made = {p: dry_step(optimizer, group, p, p.grad) for p, group in pairs}
    assert_equal({"state": optimizer.state_dict(), "weights": guide.model.state_dict()}, frozen)
    before = {p: optimizer.state[p]["z"].clone() if "z" in optimizer.state[p] else p.detach().clone() for p, _ in pairs}
    rates = {p: group["lr"] for p, group in pairs}
    optimizer.step()
    for p, step in made.items():
        now = optimizer.state[p]["z"] if "z" in optimizer.state[p] else p.detach()
        assert torch.allclose(step.direction, (before[p] - now) / rates[p], rtol=1e-3, atol=2e-4)


# ---------------------------------------------------------------- granularity, memory, FLOPs


@pytest.mark.parametrize("name", NAMES)
def test_slices_are_for_elementwise_optimizers(name: str) -> None:
    guide = Guide(BERT.build(), Config(granularity="head", ffn_blocks=2, **settings()))
    if name in WHOLE:
        assert not KINDS[name].is_elementwise
        with pytest.raises(OptimizerError, match=r"changes meaning on slices(.|\n)*granularity='layer'"):
            optimizer_of(guide, name)
        return
    assert KINDS[name].is_elementwise
    optimizer = optimizer_of(guide, name, factor=0.3)
    _, losses = guided(guide, optimizer, Examples(BERT, count=24), epochs=12, clip=1.0)
    assert guide._decisions.has_decided
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_state_are_known_before_the_first_step(name: str) -> None:
    guide = Guide(BERT.build(), Config(preset="full"))
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    optimizer = guide.make_optimizer(name, lr=1e-3)
    forecast = {p: state_bytes(optimizer)(p, 1.0) for g in optimizer.param_groups for p in g["params"]}
    guided(guide, optimizer, Examples(BERT), steps=1)
    for parameter, state in optimizer.state.items():
        held = sum(v.nbytes for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("qmap"))
        assert held == forecast[parameter], tuple(parameter.shape)


def test_bytes_of_quantised_state() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.zeros(80, 70))
    parameter.grad = torch.ones(80, 70)
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    forecast = state_bytes(optimizer)(parameter, 1.0)
    optimizer.step()
    state = optimizer.state[parameter]
    assert (
        forecast
        == sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
        < 0.27 * 2 * 80 * 70 * 4
    )


def test_muons_products_are_booked_and_paid_for() -> None:
    guide, optimizer = measured_guide("muon", budget=0.9)
    assert isinstance(optimizer, MuonAdamW)
    hidden = [p for group in optimizer.param_groups if group["is_matrix"] for p in group["params"]]
    assert hidden
    per_step = sum(newton_schulz_flops(p.shape, 5) for p in hidden)
    steps: list[float] = []
    guided(guide, optimizer, Examples(BERT, 48), epochs=3, after_step=lambda g: steps.append(g.ledger.optimizer_flops))
    assert steps[0] == pytest.approx(per_step)
    assert 0 < guide.ledger.optimizer_flops <= len(steps) * per_step
    assert guide.budget_spent <= 1.0
    counted = torch.utils.flop_counter.FlopCounterMode(display=False)
    alone = torch.optim.Muon(hidden, lr=1e-3)
    for parameter in hidden:
        parameter.grad = torch.ones_like(parameter)
    with counted:
        alone.step()
    assert counted.get_total_flops() == pytest.approx(per_step)


# ---------------------------------------------------------------- schedule-free


def schedule_free() -> tuple[Guide, Any]:
    pytest.importorskip("schedulefree")
    return measured_guide("schedule-free", budget=0.6, mask={"frozen_fraction": 0.5})


def test_evaluating_shows_the_mean_and_gives_the_weights_back() -> None:
    guide, optimizer = schedule_free()
    guided(guide, optimizer, Examples(BERT), steps=5)
    assert 0 < len(guide.plan.active()) < len(guide.partition)
    before = weights_of(guide)
    off = set(guide.partition.names) - set(guide.plan.active())
    with guide.evaluating():
        shown = changed(guide, before)
        for name in guide.plan.active():
            for p, y in zip(guide._binding.parameters[name], before[name], strict=True):
                if "z" in optimizer.state[p]:
                    assert torch.allclose(p, (y - 0.1 * optimizer.state[p]["z"]) / 0.9, atol=1e-5)
    assert shown
    assert not shown & off
    assert not changed(guide, before)
    optimizer.eval()
    assert changed(guide, before) == shown
    optimizer.train()
    assert not changed(guide, before)


def test_a_run_ends_with_the_mean() -> None:
    guide, optimizer = schedule_free()
    last: list[dict[str, list[Tensor]]] = []
    guided(guide, optimizer, Examples(BERT), epochs=2, after_step=lambda g: last.append(weights_of(g)))
    moved = changed(guide, last[-1])
    assert moved
    assert moved <= set(guide.plan.active())
    ended = weights_of(guide)
    with guide.evaluating():
        assert not changed(guide, ended)
    guide.detach()
    assert "eval" not in optimizer.__dict__


def test_what_does_not_go_with_schedule_free_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    averaging = Guide(BERT.build(), Config(update={"average_last": 0.3}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"average_last: expected 0 with AdamWScheduleFree"):
        averaging.make_optimizer("schedule-free", lr=1e-2)
    guide = Guide(BERT.build(), Config(**settings()))
    with pytest.raises(OptimizerError, match=r"counts steps in its groups(.|\n)*by='component'"):
        guide.set_optimizer(schedulefree.AdamWScheduleFree(guide.param_groups(lr=1e-2), lr=1e-2))


# ---------------------------------------------------------------- others


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    guide = Guide(BERT.build(), Config(preset="full"))
    with pytest.raises(OptimizerError, match=r"rgft\[optimizers\]"):
        guide.make_optimizer("lion", lr=1e-4)
    with pytest.raises(ConfigError, match="expected one of adamw, sgd"):
        guide.make_optimizer("adamv", lr=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad])
def test_optimizers_that_users_bring_are_scored_too(kind: Callable[..., Optimizer]) -> None:
    guide = Guide(BERT.build(), Config(warmup_fraction=0.9))
    guided(guide, kind(guide.param_groups(lr=1e-3), lr=1e-3), Examples(BERT), steps=4)
    assert guide._measurement is not None
    assert set(guide._measurement.same_batch_map.observed) == set(guide.partition.names)


def test_optimizers_of_all_parameters_together_are_refused() -> None:
    guide = Guide(BERT.build(), Config())
    with pytest.raises(OptimizerError, match=r"all parameters make one step together"):
        guide.set_optimizer(torch.optim.SparseAdam(list(guide.model.parameters())))
