from __future__ import annotations

import pytest
import torch
from torch import nn

from rgft.errors import ConfigError
from rgft.signals import (
    Fisher,
    GeneralisingDecrease,
    GradientSignal,
    GradNorm,
    GradOverWeight,
    PartGradient,
    PredictedDecrease,
    Taylor,
)
from tests.families import FAMILIES
from tests.unit.signals.hand_made import LAYERS, by_layer, double, gradients, probe_of, untouched

DIRECT = [
    (GradNorm(p=2), lambda g, w, n: float((g**2).sum() / n) ** 0.5),
    (GradNorm(p=2, normalise="raw"), lambda g, w, n: float(g.norm(2))),
    (GradNorm(p=1), lambda g, w, n: float(g.norm(1)) / n),
    (GradNorm(p=1, normalise="raw"), lambda g, w, n: float(g.norm(1))),
    (Fisher(), lambda g, w, n: float((g * g).mean())),
    (Fisher(reduction="sum"), lambda g, w, n: float((g * g).sum())),
    (Taylor(), lambda g, w, n: sum(abs(float(a) * float(b)) for a, b in zip(g, w, strict=True))),
    (Taylor(group=True), lambda g, w, n: abs(float(g @ w))),
    (GradOverWeight(exponent=0.5, epsilon=0.1), lambda g, w, n: float((g.abs() / (w.abs() + 0.1).sqrt()).mean())),
    (GradOverWeight(reduction="sum"), lambda g, w, n: float((g.abs() / (w.abs() + 1.0)).sum())),
]


@pytest.mark.parametrize(("signal", "direct"), DIRECT)
def test_measure_and_score_equal_the_formula(signal: GradientSignal, direct) -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    partition = by_layer(model, LAYERS["bert"])
    expected, found = {}, gradients(model, batch)
    for component in partition:
        names = [s.parameter for s in component.slices]
        g = torch.cat([found[name].flatten() for name in names])
        w = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
        expected[component.name] = direct(g, w, len(w))

    check = untouched(model)
    measured = signal.measure(probe_of(model, partition, batch))
    check()
    assert measured == pytest.approx(expected, rel=1e-10)
    scored = signal.score(
        partition,
        lambda c: [PartGradient(weight=model.get_parameter(s.parameter), gradient=found[s.parameter])
                   for s in c.slices],
    )  # fmt: skip
    assert scored == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("cls", [PredictedDecrease, GeneralisingDecrease])
def test_decrease_is_minus_the_inner_product_and_predicts_the_loss(cls: type[GradientSignal]) -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    partition = by_layer(model, LAYERS["bert"])
    found = gradients(model, FAMILIES["bert"].batch(seed=7))
    steps = {c.name: tuple(-1e-6 * found[s.parameter] for s in c.slices) for c in partition}
    probe = probe_of(model, partition, batch, update=steps.get)
    measured = cls().measure(probe)

    with torch.no_grad():
        before = float(probe.loss(model, batch))
    for component in partition:
        with torch.no_grad():
            for p, step in zip(probe.parameters[component.name], steps[component.name], strict=True):
                p += step
            decrease = before - float(probe.loss(model, batch))
            for p, step in zip(probe.parameters[component.name], steps[component.name], strict=True):
                p -= step
        assert measured[component.name] == pytest.approx(decrease, rel=1e-3)


def test_decrease_holds_components_without_a_step_and_refuses_a_probe_without_any() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    partition = by_layer(model, LAYERS["bert"])
    known = LAYERS["bert"][0]
    steps = {known: tuple(torch.ones(s.shape) for s in partition[known].slices)}
    check = untouched(model)
    assert set(GeneralisingDecrease().measure(probe_of(model, partition, batch, update=steps.get))) == {known}
    check()
    with pytest.raises(ConfigError, match=r"generalising_decrease.*optimizer"):
        GeneralisingDecrease().measure(probe_of(model, partition, batch))
    part = PartGradient(weight=torch.ones(2), gradient=torch.ones(2))
    with pytest.raises(ConfigError, match="step"):
        PredictedDecrease().partial(part)


class _HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.frozen(self.used(x))


def test_a_component_that_no_gradient_reaches_is_held() -> None:
    torch.manual_seed(0)
    model = _HalfUsed()
    model.frozen.requires_grad_(False)
    partition = by_layer(model, ("used", "unused", "frozen"))
    probe = probe_of(model, partition, torch.randn(4, 3), lambda m, x: m(x).square().mean())
    check = untouched(model)
    assert set(GradNorm().measure(probe)) == {"used"}
    check()
    assert GradNorm().score(partition, lambda component: []) == {}


def test_streaming_holds_one_gradient_at_a_time() -> None:
    """While the backward pass runs, the gradients of parameters scored earlier are gone."""
    model, batch = double("bert"), FAMILIES["bert"].batch()
    alive: list[int] = []

    class Spy(GradNorm):
        def partial(self, part: PartGradient) -> torch.Tensor:
            alive.append(sum(p.grad is not None for p in model.parameters()))
            return super().partial(part)

    Spy().measure(probe_of(model, by_layer(model, LAYERS["bert"]), batch))
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) <= 1


def test_half_precision_is_summed_in_float32() -> None:
    gradient = torch.full((4096,), 1e-3, dtype=torch.float16)
    part = PartGradient(weight=gradient, gradient=gradient)
    assert GradNorm().partial(part).dtype == torch.float32
    assert float(Fisher().partial(part)) == pytest.approx(4096 * float(gradient[0]) ** 2, rel=1e-5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"grad_norm\.p: expected one of 1, 2; found 3"):
        GradNorm(p=3)
    with pytest.raises(ConfigError) as caught:
        GradOverWeight(exponent=-1.0, epsilon=0.0)
    assert len(caught.value.problems) == 2
