"""The standard metrics of GLUE and SuperGLUE. An undefined value is left out, never reported as 0."""

from __future__ import annotations

import torch
from torch import Tensor

from rgft.tasks import metrics


def classes(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 (as CommitmentBank has it), Matthews correlation and calibration error."""
    return metrics.classification(logits, labels)


def binary(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Those of classification, with the F1 of class 1 as `f1`, as MRPC and QQP have it, beside `macro_f1`."""
    found = metrics.classification(logits, labels)
    return {**found, "f1": _f1(logits.argmax(-1), labels), "macro_f1": found["f1"]}


def numbers(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Mean squared error, Pearson's and Spearman's correlation, as STS-B has them."""
    found = metrics.regression(logits, labels)
    ranked = metrics.regression(_ranks(logits.reshape(-1)), _ranks(labels.reshape(-1)))
    return {**found, **({"spearman": ranked["pearson"]} if "pearson" in ranked else {})}


def choices(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """Accuracy of choosing, in each group, the row that is likeliest to be right (COPA).

    `row_accuracy` is that of the rows taken alone.
    """
    score = logits[:, 1] - logits[:, 0]
    names = groups.unique()
    right = sum(int(labels[groups == name][score[groups == name].argmax()] == 1) for name in names)
    return {"accuracy": right / len(names), "row_accuracy": float((logits.argmax(-1) == labels).double().mean())}


def answers(logits: Tensor, labels: Tensor, groups: Tensor) -> dict[str, float]:
    """F1 of the right answers over all rows (`f1`), and the share of questions with all answers judged right (`exact`).

    As MultiRC has them (Khashabi et al. 2018): F1a and EM.
    """
    predicted = logits.argmax(-1)
    names = groups.unique()
    whole = sum(bool((predicted == labels)[groups == name].all()) for name in names)
    return {
        "f1": _f1(predicted, labels), "exact": whole / len(names),
        "accuracy": float((predicted == labels).double().mean()),
    }  # fmt: skip


def _f1(predicted: Tensor, labels: Tensor) -> float:
    """Of class 1; 0 where nothing of it is found, as scikit-learn has it."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    found = float((predicted == 1).sum() + (labels == 1).sum())
    return 2.0 * hits / found if found else 0.0


def _ranks(values: Tensor) -> Tensor:
    """From 1, ties having their mean."""
    _, back, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1.0) / 2.0)[back]
