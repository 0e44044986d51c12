from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rgft.errors import DataError
from rgft.signals.targets import Targets, targets_of

MODEL = nn.Identity()


def found(batch, output, **more) -> Targets:
    return targets_of(MODEL, batch, output, **{"outputs": None, "shift": None, **more})


def test_the_task_is_inferred_from_the_labels() -> None:
    logits = torch.randn(2, 5)
    assert found({"labels": torch.tensor([1, 4])}, SimpleNamespace(logits=logits)).task == "classification"
    assert found((torch.zeros(2), torch.randn(2, 5)), logits).task == "regression"
    assert found({"label": torch.randn(2)}, (torch.randn(2, 1), None)).labels.shape == (2, 1)
    ids = torch.tensor([[1, 2, 3]])
    causal = found({"input_ids": ids, "labels": torch.tensor([[-100, 2, 3]])}, torch.randn(1, 3, 5))
    assert (causal.task, causal.shifted, causal.labels.tolist()) == ("language_model", True, [[2, 3]])
    masked = found({"input_ids": ids, "labels": torch.tensor([[-100, 4, -100]])}, torch.randn(1, 3, 5))
    assert (masked.shifted, masked.labels.shape) == (False, (1, 3))
    assert not found({"input_ids": ids, "labels": ids}, torch.randn(1, 3, 5), shift=False).shifted


def test_brier_is_the_squared_distance_of_one_hot_and_softmax_over_counting_targets() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, -100, 0, 1])
    expected = sum(
        float((torch.eye(3, dtype=torch.float64)[labels[i]] - logits[i].softmax(0)).square().sum()) for i in (0, 2, 3)
    )
    assert float(found({"labels": labels}, logits).residual()) == pytest.approx(expected / 3, rel=1e-12)


def test_squared_error_sums_outputs_and_averages_examples() -> None:
    y, labels = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert float(found({"labels": labels}, y).residual()) == (1 + 4 + 9) / 2


def test_a_confidently_wrong_prediction_has_a_vanishing_residual_gradient() -> None:
    """The weakness that residual_dot's docstring names."""
    norms = []
    for confidence in (1.0, 20.0):
        logits = torch.tensor([[confidence, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        found({"labels": torch.tensor([1])}, logits).residual().backward()
        norms.append(float(logits.grad.norm()))
    assert norms[0] > 0.1
    assert norms[1] < 1e-6


@pytest.mark.parametrize(
    ("batch", "output", "message"),
    [
        ({"labels": torch.tensor([1, 2])}, torch.randn(2, 1, 4), "integer labels"),
        ({"labels": torch.tensor([1, 9])}, torch.randn(2, 4), r"0…3 .* found 1…9"),
        ({"labels": torch.tensor([-100, -100])}, torch.randn(2, 4), "no target"),
        ({"labels": torch.randn(2)}, torch.randn(2, 3), "one output per float label"),
        ({"labels": torch.tensor([1, 2])}, "text", "outputs="),
        ({"x": torch.tensor([1, 2])}, torch.randn(2, 4), r"found keys \['x'\]"),
        ({"labels": torch.ones(2, 3, dtype=torch.long)}, torch.randn(2, 3, 4), "shift="),
    ],
)
def test_errors(batch, output, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(batch, output)


def test_brier_of_several_labels_is_the_squared_distance_to_the_sigmoid() -> None:
    torch.manual_seed(0)
    model = nn.Identity()
    model.config = SimpleNamespace(problem_type="multi_label_classification")  # type: ignore[assignment]
    logits, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    targets = targets_of(model, {"labels": labels}, logits, outputs=None, shift=None)
    assert targets.task == "multi_label_classification"
    assert targets.counting.tolist() == labels.tolist()
    expected = sum(
        (1 / (1 + math.exp(-float(logits[i, c]))) - float(labels[i, c])) ** 2 for i, c in product(range(2), range(3))
    )
    assert float(targets.residual()) == pytest.approx(expected / 2, rel=1e-12)
    with pytest.raises(DataError, match="one output per float label"):
        targets_of(model, {"labels": labels[:, :2]}, logits, outputs=None, shift=None)
