"""Measuring on a toy, against gradients and Adam steps worked out directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft import blocks
from rgft.errors import NonFiniteError
from rgft.execution.binding import Binding
from rgft.measurement import Measurement
from rgft.signals import make
from tests.unit.execution.toy import Toy, toy_batch, toy_binding

LR, BETAS, EPS = 0.01, (0.9, 0.99), 1e-8
Gradients = dict[str, list[Tensor]]


@pytest.fixture(autouse=True, params=[1 << 16, 16], ids=["whole", "in_blocks"])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", request.param)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), batch[:, 0] % 2)


def measurement(signal: str, **options: Any) -> tuple[Toy, Binding, Measurement, torch.optim.Optimizer]:
    model = Toy().double()
    binding = toy_binding(model)
    measured = Measurement(model, binding, make(signal, **options), loss, beta=0.5, bias_correction=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.3)
    return model, binding, measured, optimizer


def gradients(model: nn.Module, binding: Binding, batch: Tensor) -> Gradients:
    """In eval mode, as probes are."""
    model.eval()
    found = torch.autograd.grad(loss(model, batch), [p for _, ps in binding for p in ps], allow_unused=True)
    model.train()
    given = iter(found)
    return {c.name: [g if (g := next(given)) is not None else torch.zeros_like(p) for p in ps] for c, ps in binding}


def dot(left: list[Tensor], right: list[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        loss(model, toy_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def adam_step(optimizer: torch.optim.Optimizer, binding: Binding, of: Gradients) -> Gradients:
    """Δθ = −η m̂/(√v̂+ε) that these gradients would make from the moments kept; no decay."""
    steps: Gradients = {}
    for component, parameters in binding:
        steps[component.name] = []
        for p, g in zip(parameters, of[component.name], strict=True):
            state = optimizer.state.get(p) or {"exp_avg": 0.0 * g, "exp_avg_sq": 0.0 * g, "step": 0.0}
            n = float(state["step"]) + 1
            m, v = BETAS[0] * state["exp_avg"] + 0.1 * g, BETAS[1] * state["exp_avg_sq"] + 0.01 * g * g
            steps[component.name].append(-LR * (m / (1 - BETAS[0] ** n)) / ((v / (1 - BETAS[1] ** n)).sqrt() + EPS))
    return steps


@pytest.mark.parametrize("steps", [0, 3])
def test_generalising_decrease_of_a_probe(steps: int) -> None:
    """−⟨g(B), Δθ(A)⟩ with A `own`, B the batch; the same-batch map beside it has −⟨g(A), Δθ(A)⟩."""
    model, binding, measured, optimizer = measurement("generalising_decrease")
    measured.set_optimizer(optimizer)
    train(model, optimizer, steps)
    for group in optimizer.param_groups:
        group["lr"] = 77.0  # a schedule's: rates are the ones the optimizer was given with
    own, batch = toy_batch(20), toy_batch(21)
    of_own, of_batch = gradients(model, binding, own), gradients(model, binding, batch)
    delta = adam_step(optimizer, binding, of_own)
    scores = measured.probe(batch, own=own, step=steps)
    assert scores == pytest.approx({n: -dot(of_batch[n], delta[n]) for n in delta}, rel=1e-6)
    assert measured.error_map.values() == pytest.approx(scores)
    same = {n: -dot(of_own[n], delta[n]) for n in delta}
    assert measured.same_batch_map.values() == pytest.approx(same, rel=1e-6)
    assert all(value > 0 for value in same.values())
    measured.probe(batch, own=batch, step=steps + 1)  # one batch for both: the two decreases are one
    assert measured.same_batch_map.averages["head"] - 0.5 * 0.5 * same["head"] == pytest.approx(
        measured.error_map.averages["head"] - 0.5 * 0.5 * scores["head"]
    )


def test_a_probe_without_a_batch_of_its_own_judges_the_step_on_itself() -> None:
    model, binding, measured, optimizer = measurement("generalising_decrease")
    measured.set_optimizer(optimizer)
    batch = toy_batch(5)
    of = gradients(model, binding, batch)
    delta = adam_step(optimizer, binding, of)
    assert measured.probe(batch, step=0) == pytest.approx({n: -dot(of[n], delta[n]) for n in delta}, rel=1e-6)


def test_training_batches_judge_the_previous_step_and_then_their_own() -> None:
    """Before the step: −⟨g(B_{t+1}), Δθ_t⟩. After it: −⟨g(B_{t+1}), Δθ_{t+1}⟩."""
    model, binding, measured, optimizer = measurement("generalising_decrease")
    measured.set_optimizer(optimizer)
    model.eval()  # no dropout, so that directions can be worked out beside
    first, second = toy_batch(1), toy_batch(2)
    of_first = gradients(model.eval(), binding, first)
    first_step = adam_step(optimizer, binding, of_first)
    model.eval()
    loss(model, first).backward()
    measured.observe_training(0)
    assert not measured.error_map.observed  # there is no previous step
    optimizer.step()
    measured.observe_own_step(0)
    assert measured.same_batch_map.values() == pytest.approx(
        {n: -dot(of_first[n], first_step[n]) for n in of_first}, rel=1e-6
    )
    optimizer.zero_grad()
    of_second = gradients(model, binding, second)
    model.eval()
    loss(model, second).backward()
    measured.observe_training(1)
    assert measured.error_map.values() == pytest.approx(
        {n: -dot(of_second[n], first_step[n]) for n in of_second}, rel=1e-6
    )
    assert measured.error_map.step == 1


def test_the_predicted_decrease_is_of_the_batch_that_makes_the_step() -> None:
    """In training −⟨g(B_t), Δθ_t⟩ once the step is made, never of the next batch; in a probe of its one batch."""
    model, binding, measured, optimizer = measurement("predicted_decrease")
    measured.set_optimizer(optimizer)
    assert not measured.needs_two_batches
    first, second = toy_batch(1), toy_batch(2)
    of_first = gradients(model, binding, first)
    delta = adam_step(optimizer, binding, of_first)
    model.eval()
    loss(model, first).backward()
    measured.observe_training(0)
    optimizer.step()
    measured.observe_own_step(0)
    wanted = {n: -dot(of_first[n], delta[n]) for n in delta}
    assert measured.error_map.values() == pytest.approx(wanted, rel=1e-6)
    optimizer.zero_grad()
    loss(model, second).backward()
    measured.observe_training(1)
    assert measured.error_map.values() == pytest.approx(wanted, rel=1e-6)
    optimizer.zero_grad()
    of_second = gradients(model, binding, second)
    delta = adam_step(optimizer, binding, of_second)
    scores = measured.probe(second, step=1)
    assert scores == pytest.approx({n: -dot(of_second[n], delta[n]) for n in delta}, rel=1e-6)
    assert measured.error_map == measured.same_batch_map


def test_what_has_no_gradient_is_held() -> None:
    model, binding, measured, _ = measurement("grad_norm", p=2, normalise="raw")
    loss(model, toy_batch(1)).backward()
    expected = {c.name: sum(float(p.grad.norm()) ** 2 for p in ps if p.grad is not None) ** 0.5 for c, ps in binding}
    measured.observe_training(0)
    assert measured.error_map.values() == pytest.approx(expected, rel=1e-6)
    for parameter in binding.parameters["layers.0"]:
        parameter.grad = None
    measured.observe_training(1)
    assert measured.error_map.counts == {"embed": 2, "layers.0": 1, "layers.1": 2, "layers.2": 2, "head": 2}
    assert measured.error_map.value("layers.0") == pytest.approx(expected["layers.0"], rel=1e-6)


def test_signals_that_need_passes_of_their_own_do_not_score_training() -> None:
    model, _, measured, _ = measurement("random")
    loss(model, toy_batch(1)).backward()
    measured.observe_training(0)
    measured.observe_own_step(0)
    assert not measured.error_map.observed
    assert not measured.same_batch_map.observed


def test_probes_see_frozen_components_too() -> None:
    model, binding, measured, _ = measurement("grad_norm", p=2, normalise="raw")
    batch = toy_batch(4)
    expected = {n: dot(g, g) ** 0.5 for n, g in gradients(model, binding, batch).items()}
    for name in ("embed", "layers.0", "layers.1"):
        for parameter in binding.parameters[name]:
            parameter.requires_grad_(False)
    assert measured.probe(batch, step=3) == pytest.approx(expected, rel=1e-6)
    assert not model.embed.weight.requires_grad


def test_gradient_norm_on_request() -> None:
    model, binding, measured, _ = measurement("random")
    batch = toy_batch(4)
    squared = sum(dot(g, g) for g in gradients(model, binding, batch).values())
    measured.probe(batch, step=0)
    assert measured.gradient_norm_squared is None
    measured.probe(batch, step=1, gradient_norm=True)
    assert measured.gradient_norm_squared == pytest.approx(squared, rel=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_delta_scores_the_way_from_the_initial_weights() -> None:
    model, binding, measured, _ = measurement("delta")
    with torch.no_grad():
        model.layers[1].linear.weight.add_(0.5)  # type: ignore[union-attr]
    scores = measured.probe(toy_batch(), step=0)
    assert scores["layers.1"] > 0
    assert {n: s for n, s in scores.items() if n != "layers.1"} == dict.fromkeys(set(scores) - {"layers.1"}, 0.0)
    assert binding.partition["layers.1"].numel > 0


def test_a_loss_that_is_not_finite_observes_nothing() -> None:
    model, _, measured, _ = measurement("grad_norm")
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss of the probe before step 7 is nan, expected a number"):
        measured.probe(toy_batch(), step=7)
    assert not measured.error_map.observed
    assert model.training


def test_state_goes_round() -> None:
    model, _, measured, optimizer = measurement("generalising_decrease")
    measured.set_optimizer(optimizer)
    train(model, optimizer)
    measured.probe(toy_batch(1), own=toy_batch(2), step=3)
    *_, other, _ = measurement("generalising_decrease")
    other.load_state_dict(measured.state_dict())
    assert other.error_map == measured.error_map
    assert other.same_batch_map == measured.same_batch_map
    *_, initial, _ = measurement("delta")
    restored = measurement("delta")[2]
    state = initial.state_dict()
    state["initial"] = {n: tuple(t + 1 for t in parts) for n, parts in state["initial"].items()}
    restored.load_state_dict(state)
    assert all(s > 0 for s in restored.probe(toy_batch(), step=0).values())
