"""Weight gradients from a sample of positions: right in the mean, and nothing else is touched."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rgft.errors import AttachError
from rgft.execution.dropout import Dropout
from rgft.execution.sampled_rows import SampledRows, drawn, find_sampled
from rgft.execution.views import bind
from rgft.partition import partition
from tests.families import FAMILIES, Family

#: Places where a sample may begin: their mean is the expectation, but for the grid's width.
GRID = [(place + 0.5) / 400 for place in range(400)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(count: int) -> Tensor:
    """Scores of which a few are most."""
    return torch.exp(2.0 * normal(count))


@pytest.mark.parametrize("count", [1, 7, 20, 39, 40])
def test_the_expectation_of_a_sample_is_the_sum(count: int) -> None:
    scores_N, values_N3 = heavy(40).sqrt(), normal(40, 3, seed=1)
    sums, grid = [], 4000
    for uniform in ((place + 0.5) / grid for place in range(grid)):
        rows, factors = drawn(scores_N, count, uniform)
        assert rows.shape == factors.shape == (count,)
        sums.append((values_N3[rows] * factors[:, None]).sum(0))
    torch.testing.assert_close(torch.stack(sums).mean(0), values_N3.sum(0), rtol=0.0, atol=0.3 if count == 1 else 0.05)


def test_what_scores_most_is_taken_for_sure_and_once() -> None:
    scores_N = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1000.0, 500.0])
    for uniform in GRID:
        rows, factors = drawn(scores_N, 4, uniform)
        found = dict(zip(rows.tolist(), factors.tolist(), strict=True))
        assert len(found) == 4
        assert (found[5], found[6]) == (pytest.approx(1.0), pytest.approx(1.0))
        assert [factor for row, factor in found.items() if row < 5] == [pytest.approx(2.5)] * 2


def test_proportional_probabilities_leave_less_variance_than_equal_ones() -> None:
    scores_N = heavy(60)
    values_NI = nn.functional.normalize(normal(60, 5, seed=2)) * scores_N[:, None]

    def variance(by_N: Tensor) -> float:
        errors = []
        for uniform in GRID:
            rows, factors = drawn(by_N, 15, uniform)
            errors.append((values_NI[rows] * factors[:, None]).sum(0) - values_NI.sum(0))
        return float(torch.stack(errors).square().sum(1).mean())

    assert variance(scores_N) < 0.2 * variance(torch.ones(60))


def test_with_room_for_all_that_matters_nothing_is_lost() -> None:
    scores_N = torch.tensor([0.0, 3.0, 0.0, 0.0, 1e-3, 7.0, 0.0, 0.0])
    rows, factors = drawn(scores_N, 5, 0.3)
    found = dict(zip(rows.tolist(), factors.tolist(), strict=True))
    assert [found[row] for row in (1, 4, 5)] == [pytest.approx(1.0)] * 3
    rows, factors = drawn(torch.zeros(8), 4, 0.3)  # a gradient that vanishes
    assert rows.tolist() == [0, 2, 4, 6]
    assert factors.tolist() == [2.0] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stay_so(value: float) -> None:
    """Scalers of half precision skip a step by them."""
    scores_N = torch.ones(20)
    scores_N[3] = value
    assert drawn(scores_N, 5, 0.5)[1].isnan().any()


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def without_dropout(family: Family) -> nn.Module:
    model = family.build()
    Dropout(model).turn(off=True)
    return model


def gradients(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sampled(model: nn.Module, batch: Any, share: float = 0.25) -> SampledRows:
    paths = find_sampled(model, partition(model), batch, model_loss)
    found = SampledRows(model, paths, share, seed=0)
    found.is_on = True
    found.begin_pass(0, 0)
    return found


SAMPLED = ["bert", "gpt2", "llama", "t5", "vit"]  # GPT-2 keeps weights the other way round


@pytest.mark.parametrize("name", SAMPLED)
def test_only_weight_gradients_of_layers_are_others(name: str) -> None:
    family = FAMILIES[name]
    model, batch = without_dropout(family).double(), family.batch(rows=4)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    loss, exact = gradients(model, batch)
    rows = sampled(model, batch)
    names = {f"{path}.weight" for path in rows.paths}
    assert len(names) >= 8
    of_layers = tuple(partition(model).layers)
    assert all(name.startswith(of_layers) for name in names)
    same_loss, found = gradients(model, batch)
    assert torch.equal(same_loss, loss)
    changed = {name for name, gradient in found.items() if not torch.allclose(gradient, exact[name], rtol=1e-6)}
    assert changed <= names
    assert len(changed) > len(names) / 2
    # Over many draws the mean of each comes near, as it does for random signs.
    total = {name: torch.zeros_like(exact[name]) for name in names}
    draws = 300
    for number in range(draws):
        rows.begin_pass(0, number)
        for name, gradient in gradients(model, batch)[1].items():
            if name in names:
                total[name] += gradient / draws
    for name in names:
        single = float((found[name] - exact[name]).norm())
        rounding = 1e-6 * float(exact[name].norm())  # probabilities are float32
        assert float((total[name] - exact[name]).norm()) <= 0.3 * single + rounding, name


def test_all_positions_are_the_plain_gradient() -> None:
    family = FAMILIES["bert"]
    model, batch = without_dropout(family).double(), family.batch()
    _, exact = gradients(model, batch)
    sampled(model, batch, share=1.0)
    for name, gradient in gradients(model, batch)[1].items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-12)


def test_draws_are_those_of_the_pass_whatever_was_drawn_before() -> None:
    family = FAMILIES["bert"]
    model, batch = without_dropout(family), family.batch()
    rows = sampled(model, batch)
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    found = []
    for step, number in ((3, 1), (3, 2), (4, 1), (3, 1)):
        rows.begin_pass(step, number)
        found.append(gradients(model, batch)[1][weight])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("way", ["eval", "off"])
def test_other_passes_are_exact(way: str) -> None:
    family = FAMILIES["bert"]
    model, batch = without_dropout(family), family.batch()
    model.train(way != "eval")
    _, exact = gradients(model, batch)
    sampled(model, batch).is_on = way != "off"
    assert all(torch.equal(gradient, exact[name]) for name, gradient in gradients(model, batch)[1].items())


def test_a_layer_that_sees_one_position_of_each_example_is_exact() -> None:
    family = FAMILIES["bert"]
    model, batch = without_dropout(family), family.batch()
    assert not [path for path in sampled(model, batch).paths if "pooler" in path or "classifier" in path]
    batch = {k: v[:, :1] if v.dim() == 2 else v for k, v in batch.items()}
    assert find_sampled(FAMILIES["bert"].build(), partition(family.build()), batch, model_loss) == []
    on = gradients(model, batch)[1]
    assert all(
        torch.equal(gradient, on[name]) for name, gradient in gradients(without_dropout(family), batch)[1].items()
    )


@pytest.mark.parametrize("name", ["resnet", "efficientnet"])
def test_convolutions_are_left_alone(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    assert find_sampled(model, partition(model), family.batch(), model_loss) == []


def test_detaching_leaves_no_trace_and_copies_are_plain() -> None:
    family = FAMILIES["bert"]
    model, batch = family.build(), family.batch()
    classes = [type(module) for module in model.modules()]
    rows = sampled(model, batch)
    assert [type(module) for module in model.modules()] != classes
    assert all(isinstance(module, plain) for module, plain in zip(model.modules(), classes, strict=True))
    stored = io.BytesIO()
    pickle.dump(model, stored)
    for twin in (copy.deepcopy(model), pickle.loads(stored.getvalue())):
        assert [type(module) for module in twin.modules()] == classes
        assert twin.bert.pooler is not model.bert.pooler  # type: ignore[union-attr]
        gradients(twin, batch)
    rows.detach()
    assert [type(module) for module in model.modules()] == classes
    assert not any("_rgft_draw" in vars(module) for module in model.modules())


def test_copies_of_a_model_whose_heads_are_components_are_plain_of_draws() -> None:
    family = FAMILIES["bert"]
    model, batch = family.build(), family.batch()
    binding = bind(model, partition(model, "head"))
    with binding.plain():
        paths = find_sampled(model, partition(model), batch, model_loss)
    rows = SampledRows(model, paths, 0.25, seed=0)
    rows.is_on = True
    stored = io.BytesIO()
    pickle.dump(model, stored)
    for twin in (copy.deepcopy(model), pickle.loads(stored.getvalue())):
        assert not any("_rgft_draw" in vars(module) for module in twin.modules())
        gradients(twin, batch)
    rows.detach()
    binding.restore()
    assert [type(module) for module in model.modules()] == [type(module) for module in family.build().modules()]


def test_a_class_that_was_changed_meanwhile_is_not_taken_back() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight

    family = FAMILIES["bert"]
    model: Any = family.build()
    rows = sampled(model, family.batch())
    parametrize.register_parametrization(model.bert.encoder.layer[0].intermediate.dense, "weight", Doubled())
    with pytest.raises(AttachError, match="its class was changed after RGFT was attached"):
        rows.detach()
