"""Steps scored on samples of rows, against all rows; and what a pass leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgft import blocks
from rgft.components import Component, ParameterSlice, Partition
from rgft.execution.binding import Binding
from rgft.execution.directions import Directions
from rgft.execution.views import bind
from rgft.measurement import Measurement
from rgft.signals import make
from rgft.signals.base import PartGradient
from rgft.signals.decrease import PredictedDecrease
from rgft.step_scores import StepScores
from tests.unit.execution.toy import Toy, toy_batch, toy_binding, toy_partition


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), batch[:, 0] % 2)


def trained(row_stride: int) -> tuple[Toy, Measurement, torch.optim.Optimizer]:
    """A toy after three steps without dropout, and what measures its steps."""
    model = Toy(width=16).double().eval()
    binding = toy_binding(model)
    signal = make("generalising_decrease")
    measured = Measurement(model, binding, signal, loss, beta=0.5, bias_correction=True, row_stride=row_stride)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    measured.set_optimizer(optimizer)
    for step in range(3):
        loss(model, toy_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, measured, optimizer


@pytest.fixture
def _samples_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SAMPLED_FROM", 64)  # the linear weights are 16 × 16, the table 11 × 16


@pytest.mark.usefixtures("_samples_everything")
def test_scores_of_sampled_rows_are_right_in_the_mean() -> None:
    whole, sampled = trained(1)[1], trained(4)[1]
    expected = whole.probe(toy_batch(21), own=toy_batch(20), step=3)
    turns = [sampled.probe(toy_batch(21), own=toy_batch(20), step=3 + turn) for turn in range(4)]
    for name, value in expected.items():
        assert sum(scores[name] for scores in turns) / 4 == pytest.approx(value, rel=1e-9), name
    layers = [tuple(scores[f"layers.{i}"] for i in range(3)) for scores in turns]
    assert len(set(layers)) == 4
    assert [scores["embed"] for scores in turns] == pytest.approx([expected["embed"]] * 4, rel=1e-9)


@pytest.mark.usefixtures("_samples_everything")
def test_training_steps_scored_on_sampled_rows_are_right_in_the_mean() -> None:
    found: dict[int, list[tuple[dict[str, float], dict[str, float]]]] = {1: [], 4: []}
    for row_stride, looks in found.items():
        model, measured, _ = trained(row_stride)
        for step in range(row_stride):
            model.zero_grad()
            loss(model, toy_batch(9)).backward()
            before = measured.error_map, measured.same_batch_map
            measured.observe_training(step)
            measured.observe_own_step(step)  # the step is the last one made, as no other is
            looks.append(tuple(_observed(*maps) for maps in zip(before, _maps(measured), strict=True)))  # type: ignore
    ((expected, expected_same),) = found[1]
    assert expected == pytest.approx(expected_same)
    for name, value in expected.items():
        assert sum(look[0][name] for look in found[4]) / 4 == pytest.approx(value, rel=1e-9), name
        assert sum(look[1][name] for look in found[4]) / 4 == pytest.approx(value, rel=1e-9), name
    assert len({look[0]["layers.1"] for look in found[4]}) == 4


def _maps(measured: Measurement) -> tuple[Any, Any]:
    return measured.error_map, measured.same_batch_map


def _observed(before: Any, after: Any) -> dict[str, float]:
    """What was observed last, from the running averages around it (β = .5)."""
    return {name: 2.0 * value - before.averages.get(name, 0.0) for name, value in after.averages.items()}


def test_a_resumed_measurement_goes_on_in_turn() -> None:
    _, measured, _ = trained(4)
    measured.probe(toy_batch(21), own=toy_batch(20), step=3)
    _, other, _ = trained(4)
    other.load_state_dict(measured.state_dict())
    again = [m.probe(toy_batch(23), own=toy_batch(22), step=4) for m in (measured, other)]
    assert again[0] == again[1]


class Branches(nn.Module):
    """Two linear layers; a batch goes through the one that its first entry names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.left if float(x[0, 0]) > 0 else self.right)(x)


def branches() -> tuple[Branches, Binding, torch.optim.Optimizer, StepScores]:
    model = Branches().double()
    names = {"left": ("left.weight", "left.bias"), "right": ("right.weight", "right.bias")}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    components = tuple(
        Component(name=n, kind="rest", slices=tuple(ParameterSlice(parameter=p, shape=shapes[p]) for p in ps), depth=0)
        for n, ps in names.items()
    )
    binding = bind(model, Partition(components=components, layers=(), granularity="layer"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scores = StepScores(model, binding, Directions(optimizer), {id(p): 0.01 for p in model.parameters()}, 1)
    return model, binding, optimizer, scores


def test_what_the_first_batch_does_not_reach_makes_the_step_of_its_momentum() -> None:
    model, _, optimizer, scores = branches()
    left = torch.randn(3, 6, dtype=torch.float64).abs()
    for x in (left, -left):
        model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    signal = PredictedDecrease()
    steps, same = scores.make(lambda: model(left).square().sum().backward(), signal, 0)
    assert set(same) == {"left"}
    judged = scores.judge(lambda: model(-left).square().sum().backward(), signal, steps)
    model(-left).square().sum().backward()
    moments = optimizer.state
    expected = 0.0
    for p in model.right.parameters():
        m, v = 0.9 * moments[p]["exp_avg"] / (1 - 0.9**2), 0.999 * moments[p]["exp_avg_sq"] / (1 - 0.999**2)
        assert p.grad is not None
        expected += float((p.grad * 0.01 * m / (v.sqrt() + 1e-8)).sum())
    assert judged == {"right": pytest.approx(expected, rel=1e-6)}


def test_gradients_come_one_at_a_time_and_tables_only_with_rows_that_were_read() -> None:
    model, _, optimizer = trained(1)
    binding = toy_binding(model)
    scores = StepScores(model, binding, Directions(optimizer), {}, 1)
    rows: list[int] = []

    class Watching(PredictedDecrease):
        def partial(self, part: PartGradient) -> Tensor:
            assert all(p.grad is None for p in model.parameters())
            rows.append(len(part.gradient))
            return super().partial(part)

    batch = torch.tensor([[3, 3, 7], [3, 5, 7]])
    steps, _ = scores.make(lambda: loss(model, batch).backward(), Watching(), 0)
    assert steps.tables[id(model.embed.weight)].rows.tolist() == [3, 5, 7]
    assert rows.count(3) == 1
    assert model.embed.weight.shape[0] not in rows
    assert not model.embed.sparse
    assert all(p.grad is None for p in model.parameters())


def test_what_is_kept_of_a_step_is_the_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SAMPLED_FROM", 64)
    model, _, optimizer = trained(1)
    scores = StepScores(model, toy_binding(model), Directions(optimizer), {}, 4)
    steps, _ = scores.make(lambda: loss(model, toy_batch(2)).backward(), PredictedDecrease(), 2)
    kept = {key: sum(update.numel() for _, update in pieces) for key, pieces in steps.pieces.items()}
    assert kept[id(model.layers[0].linear.weight)] == 4 * 16  # type: ignore[union-attr]
    assert kept[id(model.head.weight)] == 2 * 16


def test_a_tied_table_keeps_dense_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    part = ParameterSlice(parameter="embed.weight", shape=(9, 4))
    component = Component(name="embed", kind="embedding", slices=(part,), depth=0)
    binding = bind(model, Partition(components=(component,), layers=(), granularity="layer"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scores = StepScores(model, binding, Directions(optimizer), {id(model.embed.weight): 0.01}, 1)

    def backward() -> None:
        model.head(model.embed(torch.tensor([1, 2]))).square().sum().backward()

    steps, same = scores.make(backward, PredictedDecrease(), 0)
    assert not steps.tables
    assert scores.judge(backward, PredictedDecrease(), steps) == pytest.approx(same)
    assert same["embed"] > 0


def test_a_table_whose_gradient_somebody_watches_keeps_it_dense() -> None:
    model, measured, _ = trained(1)
    expected = measured.probe(toy_batch(21), own=toy_batch(20), step=3)
    model, measured, _ = trained(1)
    seen: list[bool] = []

    def freeze_first_row(gradient: Tensor) -> Tensor:
        seen.append(gradient.is_sparse)
        gradient = gradient.clone()
        gradient[:0] = 0.0
        return gradient

    model.embed.weight.register_hook(freeze_first_row)
    assert measured.probe(toy_batch(21), own=toy_batch(20), step=3) == pytest.approx(expected, rel=1e-9)
    assert seen == [False, False]


def test_only_trained_tables_get_sparse_gradients() -> None:
    """A frozen one may be the base of an adapter, which looks its own tables up in the same way."""
    model = Toy().double()
    partition = toy_partition(model)
    without = tuple(c for c in partition if c.name != "embed")
    model.embed.weight.requires_grad_(False)
    binding = bind(model, Partition(components=without, layers=partition.layers, granularity="layer"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scores = StepScores(model, binding, Directions(optimizer), {}, 1)
    flags: list[bool] = []

    def backward() -> None:
        flags.append(model.embed.sparse)
        loss(model, toy_batch(2)).backward()

    scores.make(backward, PredictedDecrease(), 0)
    assert flags == [False]


def test_probes_and_training_steps_take_their_rows_in_turns_of_their_own() -> None:
    model, measured, _ = trained(4)
    for look in range(4):
        loss(model, toy_batch(look)).backward()
        measured.observe_training(look)
        measured.observe_own_step(look)
        model.zero_grad()
        measured.probe(toy_batch(look), own=toy_batch(look + 9), step=look)
    assert measured.state_dict()["looks"] == [4, 4]
