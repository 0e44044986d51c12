"""What became of each example of the test split: its loss, and the class that was chosen.

All runs of a task are tested on the same examples, so that a difference between two methods may be one of these
examples and not of the methods, however many seeds agree on it. Final results keep the outcomes, packed, and
comparisons take examples into account beside seeds.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgft.batches import SizedDataset
from rgft.bench.tasks.pass_at_k import pass_at_k
from rgft.memory.passes import pieces
from rgft.tasks.base import PreparedTask
from rgft.tasks.metrics import of_predictions

#: Field → how its numbers are stored, little-endian. Half precision keeps a loss to .05 %.
_STORED = {"loss": "<f2", "weight": "<i4", "predicted": "<i2", "label": "<i2"}

#: What half precision holds.
MAX_LOSS = 65504.0

#: How metrics of programs that pass their tests begin.
PASS = "pass@"

#: Metrics of predicted classes, and what top-1 error is one minus.
_OF_CLASSES = {"accuracy": "accuracy", "top1_error": "accuracy", "f1": "f1", "matthews": "matthews"}


class Outcomes:
    """Collects outcomes while a split is evaluated: `observe` is an `evaluation.Observer`.

    Args:
        task: whose split.
        split: what is evaluated.
    """

    def __init__(self, task: PreparedTask, split: SizedDataset) -> None:
        self._task, count = task, len(split)
        self._losses, self._weights = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int32)
        self._questions = torch.full((count,), -1)
        self._predicted, self._labels = (torch.full((count,), -1, dtype=torch.int16) for _ in range(2))
        self._has_losses = self._has_classes = True

    def observe(self, places: Sequence[int], losses: Tensor, logits: Tensor, batch: Mapping[str, Any]) -> None:
        where, labels, groups = torch.tensor(places), batch["labels"], batch.get("groups")
        if groups is not None:
            self._questions[where] = groups.cpu()
        if losses.shape == (len(places),):
            weights = torch.tensor([self._task.weight(row) for _, row in pieces(batch, 1)])
            # Losses are such that their mean is that of all that the batch weighs.
            sums = losses.double().cpu() * (self._task.weight(batch) / len(places))
            self._losses[where] = torch.where(weights > 0, sums / weights, 0.0)
            self._weights[where] = weights.to(torch.int32)
        else:
            self._has_losses = False
        if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1 and not labels.is_floating_point():
            self._predicted[where] = logits.argmax(-1).cpu().to(torch.int16)
            self._labels[where] = labels.cpu().to(torch.int16)
        else:
            self._has_classes = False

    def to_dict(self) -> dict[str, str]:
        """Field → its numbers in the split's order, packed; a field that there is not is left out.

        `loss`: mean of the example; `weight`: what it counts for in the split's (not said where all count alike);
        `predicted`, `label`: classes. Rows of one question are one example, and have no classes of their own.
        """
        found: dict[str, Tensor] = {}
        are_rows = bool((self._questions < 0).all())
        losses, weights = (self._losses, self._weights) if are_rows else self._of_questions()
        if self._has_losses and not bool((losses.abs() > MAX_LOSS).any()):
            found["loss"] = losses
            if bool((weights != 1).any()):
                found["weight"] = weights
        if self._has_classes and are_rows:
            found |= {"predicted": self._predicted, "label": self._labels}
        return {name: _packed(values, name) for name, values in found.items()}

    def _of_questions(self) -> tuple[Tensor, Tensor]:
        """The mean loss of each question and what it weighs, [questions] both; a row that is of none is one."""
        alone = -1 - torch.arange(len(self._questions))
        names, of_row = torch.where(self._questions >= 0, self._questions, alone).unique(return_inverse=True)
        weights = torch.zeros(len(names), dtype=torch.int32).index_add_(0, of_row, self._weights)
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, of_row, self._losses * self._weights)
        return torch.where(weights > 0, sums / weights, 0.0), weights


def examples_of_test(result: Mapping[str, Any]) -> int | None:
    """How many examples a run was tested on, of which rows of one question are one; None: it does not say."""
    if "loss" in (stored := result.get("outcomes") or {}):
        return len(_unpacked(stored, "loss"))
    return ((result.get("data") or {}).get("test") or {}).get("examples")


def by_example(result: Mapping[str, Any], metric: str) -> Tensor | None:
    """What each test example brings to a metric of a run: values [N] in float64 whose mean is the metric.

    Of pass@k they are of the problems.

    Of a metric that is no mean over examples these are the jackknife's pseudo-values (Efron and Tibshirani 1993,
    chapter 11), whose mean is the metric but for its bias.

    Returns:
        None where the run does not say, the metric is undefined without some example, or is another one of this name
        (the F1 of one class, the accuracy of choosing among rows).
    """
    stored = result.get("outcomes") or {}
    if metric == "loss" and "loss" in stored:
        losses = _unpacked(stored, "loss")
        weights = _unpacked(stored, "weight") if "weight" in stored else torch.ones_like(losses)
        mean = (losses * weights).sum() / weights.sum()
        return mean + (losses - mean) * weights / weights.mean()
    if metric in _OF_CLASSES and "predicted" in stored:
        predicted, labels = (_unpacked(stored, field).long() for field in ("predicted", "label"))
        name, told = _OF_CLASSES[metric], result["metrics"]["test"].get(metric)
        is_error = metric == "top1_error"
        whole = of_predictions(predicted, labels).get(name)
        if whole is None or told is None or abs((1.0 - whole if is_error else whole) - told) > 1e-6:
            return None
        values = _pseudo_values(predicted, labels, name, whole)
        return 1.0 - values if is_error and values is not None else values
    judged = result.get("judged") or {}
    if metric.startswith(PASS) and "problems" in judged:
        samples, k = judged["samples"], int(metric.removeprefix(PASS))
        rates = [pass_at_k(samples, problem["passed"], k) for problem in judged["problems"]]
        return torch.tensor(rates, dtype=torch.float64)
    return None


def _pseudo_values(predicted: Tensor, labels: Tensor, name: str, whole: float) -> Tensor | None:
    if name == "accuracy":
        return (predicted == labels).double()
    count = len(labels)
    values = torch.zeros(count, dtype=torch.float64)
    for label, guess in torch.stack([labels, predicted], 1).unique(dim=0).tolist():
        alike = (labels == label) & (predicted == guess)  # leaving out any of these makes the same metric
        rest = torch.ones(count, dtype=torch.bool)
        rest[int(alike.nonzero()[0])] = False
        without = of_predictions(predicted[rest], labels[rest]).get(name)
        if without is None:
            return None
        values[alike] = count * whole - (count - 1) * without
    return values


def _packed(values: Tensor, field: str) -> str:
    return b64encode(values.numpy().astype(_STORED[field]).tobytes()).decode("ascii")


def _unpacked(stored: Mapping[str, str], field: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(b64decode(stored[field]), dtype=_STORED[field]).astype(np.float64))
