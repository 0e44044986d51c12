from __future__ import annotations

import math

import pytest
import torch

from rgft.errors import ConfigError
from rgft.signals import (
    Fisher,
    GeneralisingDecrease,
    GradNorm,
    LinearSketch,
    Taylor,
    estimate,
    sketched_measure,
)
from tests.families import FAMILIES
from tests.unit.signals.hand_made import (
    LAYERS,
    by_head,
    by_layer,
    double,
    gradients,
    probe_of,
    untouched,
)

N, D, E = 40, 48, 64
KINDS = ["random", "near_rank_one"]


def data(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """X [N, D] and dY [N, E] whose product is a random or a near-rank-one gradient."""
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        # Orthonormal X makes dYᵀX a matrix of independent normal entries.
        x = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]
        return x, torch.randn(D, E, generator=generator, dtype=torch.float64)
    x, dy = torch.randn(N, D, generator=generator).double(), torch.randn(N, E, generator=generator).double()
    return x * 0.02 + x[:1], dy * 0.02 + dy[:1]


def sketch_of(x, dy, *, side, seed=0, signs=8, transposed=False) -> LinearSketch:
    generator = torch.Generator().manual_seed(seed)
    sketch = LinearSketch(inputs=D, outputs=E, signs=signs, side=side, generator=generator, transposed=transposed)
    sketch.add(sketch.keep(x), dy)
    return sketch


@pytest.mark.parametrize("side", ["input", "output"])
def test_draws_are_the_formula(side) -> None:
    """‖(dY v)ᵀX‖² and ⟨(dY v)ᵀX, vᵀΔ⟩, or the same with signs on the input side, written out."""
    x, dy = data("random")
    delta = torch.randn(E, D, dtype=torch.float64)
    sketch = sketch_of(x, dy, side=side, signs=3)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (D if side == "input" else E, 3), generator=generator).double() * 2 - 1
    for j in range(3):
        v = signs[:, j]
        u = dy.T @ (x @ v) if side == "input" else (dy @ v) @ x
        assert float(sketch.squared_norm()[j]) == pytest.approx(float(u @ u))
        w = delta @ v if side == "input" else v @ delta
        assert float(sketch.inner_product(delta)[j]) == pytest.approx(float(u @ w))
        assert float(sketch.squared_norm(8, 20)[j]) == pytest.approx(float(u[8:20] @ u[8:20]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("side", "bounds", "transposed"),
    [("input", (16, 40), False), ("output", (16, 40), False), ("input", (0, 64), True), ("output", (8, 16), True)],
)
def test_unbiased_within_four_standard_errors_of_many_draws(kind, side, bounds, transposed) -> None:
    x, dy = data(kind)
    weight_gradient = dy.T @ x
    start, stop = bounds
    exact = weight_gradient[start:stop] if side == "input" else weight_gradient[:, start:stop]
    # Δ is not along the gradient, or a sign error in the layout would go unseen.
    delta = exact + torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).double() * exact.std()
    sketch = sketch_of(x, dy, side=side, signs=4000, transposed=transposed)
    for draws, truth in (
        (sketch.squared_norm(start, stop), exact.square().sum()),
        (sketch.inner_product(delta.T if transposed else delta, start, stop), (exact * delta).sum()),
    ):
        found = estimate(draws)
        assert abs(found.value - float(truth)) < 4 * found.standard_error
        assert found.standard_error < 0.05 * abs(float(truth))


@pytest.mark.parametrize(("kind", "stated"), [("random", 0.06), ("near_rank_one", 0.49)])
def test_the_relative_error_that_the_docstring_states(kind: str, stated: float) -> None:
    """m = 8: 4,000 sketches as one of 32,000 draws, eight by eight; the reported standard error agrees."""
    x, dy = data(kind)
    truth = float((dy.T @ x).square().sum())
    draws = sketch_of(x, dy, side="input", signs=32_000).squared_norm().reshape(4000, 8)
    assert float(draws.mean(1).std()) / truth == pytest.approx(stated, abs=0.01)
    reported = (draws.var(1) / 8).mean().sqrt() / truth
    assert float(reported) == pytest.approx(stated, abs=0.01)


def test_calls_of_a_shared_module_are_summed_before_squaring() -> None:
    x, dy = data("random")
    once = sketch_of(x, dy, side="input")
    twice = LinearSketch(inputs=D, outputs=E, signs=8, side="input", generator=torch.Generator().manual_seed(0))
    for rows in (slice(0, 10), slice(10, None)):
        twice.add(twice.keep(x[rows]), dy[rows])
    torch.testing.assert_close(once.squared_norm(), twice.squared_norm())


def test_misuse() -> None:
    sketch = LinearSketch(inputs=4, outputs=4, side="input", generator=torch.Generator())
    with pytest.raises(ValueError, match="add"):
        sketch.squared_norm()
    assert math.isnan(estimate(torch.ones(1)).standard_error)


@pytest.mark.parametrize("signal", [GradNorm(), GradNorm(normalise="raw"), Fisher()])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_sketched_measure_agrees_with_measure_within_its_error(family: str, signal) -> None:
    model, batch = double(family), FAMILIES[family].batch()
    probe = probe_of(model, by_layer(model, LAYERS[family]), batch)
    exact = signal.measure(probe)
    check = untouched(model)
    found = sketched_measure(probe, signal, signs=2000)
    check()
    assert set(found.scores) == set(exact)
    for name, error in found.standard_errors.items():
        assert abs(found.scores[name] - exact[name]) < 4 * error, name
        assert error < 0.03 * exact[name]
    for name in set(exact) - set(found.standard_errors):
        assert found.scores[name] == pytest.approx(exact[name], rel=1e-12)
    assert set(LAYERS[family]) <= set(found.standard_errors)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_heads_are_estimated_from_their_rows_and_columns(family: str) -> None:
    """Fused weights are off; the heads' slices of their gradients are estimated, norm and inner product."""
    model, batch = double(family), FAMILIES[family].batch()
    partition = by_head(model, family)
    found = gradients(model, batch)
    generator = torch.Generator().manual_seed(3)
    steps = {
        c.name: tuple(
            -s.of(found[s.parameter]) + 0.3 * s.of(found[s.parameter]).std()
            * torch.randn(s.of(found[s.parameter]).shape, generator=generator).double()
            for s in c.slices
        )
        for c in partition
    }  # fmt: skip
    sliced = {s.parameter for c in partition for s in c.slices if not s.is_whole}
    for name in sliced:
        model.get_parameter(name).requires_grad_(False)
    probe = probe_of(model, partition, batch, update=steps.get)
    norms = sketched_measure(probe, Fisher(reduction="sum"), signs=2000)
    decreases = sketched_measure(probe, GeneralisingDecrease(), signs=2000, seed=1)
    heads = [c for c in partition if c.kind == "head"]
    assert heads
    for head in heads:
        weights = [(s.of(found[s.parameter]), step)
                   for s, step in zip(head.slices, steps[head.name], strict=True) if len(s.shape) == 2]  # fmt: skip
        square = sum(float(g.square().sum()) for g, _ in weights)
        inner = -sum(float((g * step).sum()) for g, step in weights)
        for result, truth in ((norms, square), (decreases, inner)):
            assert abs(result.scores[head.name] - truth) < 4 * result.standard_errors[head.name], head.name
            assert result.standard_errors[head.name] < 0.2 * truth


def test_weights_require_no_gradient_inside_and_the_step_changes_the_signs() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    inside: dict[str, bool] = {}

    def loss(model, batch):
        inside.update({name: p.requires_grad for name, p in model.named_parameters()})
        return model(**batch).loss

    partition = by_layer(model, LAYERS["bert"])
    first, second = (
        sketched_measure(probe_of(model, partition, batch, loss, step=step), GradNorm()).scores for step in (1, 2)
    )
    assert first != second
    again = sketched_measure(probe_of(model, partition, batch, loss, step=1), GradNorm()).scores
    assert first == again
    linear = {name for name in inside if name.endswith("weight") and "embeddings" not in name and "Norm" not in name}
    assert {name for name, on in inside.items() if not on} == linear


def test_a_frozen_bottom_is_scored_and_weights_shared_between_modules_exactly() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(first, torch.nn.ReLU(inplace=True), second).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    probe = probe_of(model, by_layer(model, ("0", "2")), x, loss)
    exact = GradNorm().measure(probe)
    found = sketched_measure(probe, GradNorm(), signs=4000)
    assert found.scores == pytest.approx(exact, rel=0.05)
    assert set(found.standard_errors) == {"0", "2"}

    second.weight = first.weight
    probe = probe_of(model, by_layer(model, ("0",)), x, loss)
    shared = sketched_measure(probe, GradNorm(), signs=8)
    assert shared.standard_errors == {}
    assert shared.scores == pytest.approx(GradNorm().measure(probe), rel=1e-12)


def test_signals_that_no_sketch_can_stand_for_are_refused() -> None:
    model, batch = double("bert"), FAMILIES["bert"].batch()
    probe = probe_of(model, by_layer(model, LAYERS["bert"]), batch)
    for signal in (GradNorm(p=1), Taylor()):
        with pytest.raises(ConfigError, match=signal.name):
            sketched_measure(probe, signal)
    with pytest.raises(ConfigError, match="signs=0"):
        sketched_measure(probe, GradNorm(), signs=0)
    with pytest.raises(ConfigError, match="optimizer"):
        sketched_measure(probe, GeneralisingDecrease())
