"""Metrics of a whole split, in plain torch. An undefined value is left out, never reported as 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class OfWholeSplit:
    """Keeps all logits and labels; for metrics that are not sums over batches.

    Args:
        function: (logits [N, …], labels [N]) of a whole split → name → value.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], dict[str, float]]) -> None:
        self._function = function
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        self._logits.append(logits.float().cpu())
        self._labels.append(batch["labels"].cpu())

    def compute(self) -> dict[str, float]:
        return self._function(torch.cat(self._logits), torch.cat(self._labels)) if self._labels else {}


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1, Matthews correlation and expected calibration error.

    Args:
        logits: [N, C].
        labels: [N], integers.

    Returns:
        `accuracy`; `f1` (macro over the classes that occur in labels or predictions); `matthews`, where both labels and
        predictions have at least two classes; `calibration_error` (15 bins of equal width over the largest probability,
        Guo et al. 2017, eq. 3).
    """
    return {**of_predictions(logits.argmax(-1), labels), "calibration_error": calibration_error(logits, labels)}


def of_predictions(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Those of `classification` that depend on the predicted classes alone. Both [N], integers."""
    metrics = {"accuracy": float((predicted == labels).double().mean()), "f1": _macro_f1(predicted, labels)}
    matthews = _matthews(predicted, labels)
    if matthews is not None:
        metrics["matthews"] = matthews
    return metrics


def regression(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean squared error; Pearson's and Spearman's correlation where neither side is constant. Both [N] or [N, 1]."""
    x, y = outputs.reshape(-1).double(), targets.reshape(-1).double()
    metrics = {"mse": float((x - y).square().mean())}
    for name, correlation in (("pearson", _correlation(x, y)), ("spearman", _correlation(_ranks(x), _ranks(y)))):
        if correlation is not None:
            metrics[name] = correlation
    return metrics


def _correlation(x: Tensor, y: Tensor) -> float | None:
    if bool((x == x[0]).all()) or bool((y == y[0]).all()):  # what rounding leaves of a mean is no variation
        return None
    dx, dy = x - x.mean(), y - y.mean()
    norms = float(dx.norm() * dy.norm())
    return float(dx @ dy) / norms if norms > 0.0 else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks in float64; equal values share the mean of theirs."""
    _, places, counts = x.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1.0) / 2.0)[places]


def _macro_f1(predicted: Tensor, labels: Tensor) -> float:
    scores = []
    for name in torch.cat([predicted, labels]).unique().tolist():
        hits = float(((predicted == name) & (labels == name)).sum())
        scores.append(2.0 * hits / float((predicted == name).sum() + (labels == name).sum()))
    return sum(scores) / len(scores)


def _matthews(predicted: Tensor, labels: Tensor) -> float | None:
    """Multi-class Matthews correlation (Gorodkin 2004); None where it is undefined."""
    classes = 1 + int(max(predicted.max(), labels.max()))
    table = torch.zeros(classes, classes, dtype=torch.float64)
    table.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    total, truth, guess = table.sum(), table.sum(1), table.sum(0)
    covariance = table.trace() * total - truth @ guess
    norm = ((total**2 - guess @ guess) * (total**2 - truth @ truth)).sqrt()
    return float(covariance / norm) if norm > 0 else None


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy − confidence| over bins, weighted by their size."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    right = (predicted == labels).double()
    places = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, right - confidence)
    return float(gaps.abs().sum() / len(labels))
