"""The standard metrics of GLUE and SuperGLUE. An undefined value is left out, never reported as 0."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rgft.bench.tasks.labelled import Answered
from rgft.tasks import metrics

#: What SQuAD's and ReCoRD's evaluation leaves out of an answer.
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classes(split: Answered) -> dict[str, float]:
    """Accuracy, macro F1 (as CommitmentBank has it), Matthews correlation and calibration error."""
    return metrics.classification(split.logits, split.labels)


def binary(split: Answered) -> dict[str, float]:
    """Those of classification, with the F1 of class 1 as `f1`, as MRPC and QQP have it, beside `macro_f1`."""
    found = classes(split)
    return {**found, "f1": _f1(split.logits.argmax(-1), split.labels), "macro_f1": found["f1"]}


def numbers(split: Answered) -> dict[str, float]:
    """Mean squared error, Pearson's and Spearman's correlation, as STS-B has them."""
    found = metrics.regression(split.logits, split.labels)
    ranked = metrics.regression(_ranks(split.logits.reshape(-1)), _ranks(split.labels.reshape(-1)))
    return {**found, **({"spearman": ranked["pearson"]} if "pearson" in ranked else {})}


def choices(split: Answered) -> dict[str, float]:
    """Accuracy of choosing, in each group, the row that is likeliest to be right (COPA).

    `row_accuracy` is that of the rows taken alone.
    """
    chosen = _chosen(split)
    return {"accuracy": float((split.labels[chosen] == 1).double().mean()), "row_accuracy": _row_accuracy(split)}


def answers(split: Answered) -> dict[str, float]:
    """F1 of the right answers over all rows (`f1`), and the share of questions with all answers judged right (`exact`).

    As MultiRC has them (Khashabi et al. 2018): F1a and EM.
    """
    predicted, names = split.logits.argmax(-1), split.groups.unique()
    whole = sum(bool((predicted == split.labels)[split.groups == name].all()) for name in names)
    return {"f1": _f1(predicted, split.labels), "exact": whole / len(names), "accuracy": _row_accuracy(split)}


def named(split: Answered) -> dict[str, float]:
    """Of the name that is likeliest in each group: mean overlap with the answers (`f1`), share of answers (`exact`).

    As ReCoRD has them (Zhang et al. 2018); `accuracy` is that of the rows taken alone.
    """
    chosen = _chosen(split)
    return {
        "f1": float(split.worths[chosen].double().mean()), "exact": float((split.labels[chosen] == 1).double().mean()),
        "accuracy": _row_accuracy(split),
    }  # fmt: skip


def normalised(answer: str) -> str:
    """In lower case, without punctuation and articles: how SQuAD compares answers (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def overlap(answer: str, expected: Sequence[str]) -> float:
    """F1 of an answer's words and the words of that expected answer to which it is nearest, 0…1."""
    return max(_word_f1(normalised(answer).split(), normalised(other).split()) for other in expected)


def _word_f1(words: Sequence[str], others: Sequence[str]) -> float:
    if not words or not others:  # nothing but articles and punctuation
        return float(words == others)
    return 2.0 * (Counter(words) & Counter(others)).total() / (len(words) + len(others))


def _chosen(split: Answered) -> Tensor:
    """Of each group the row that is likeliest to be right, [groups]."""
    score = split.logits[:, 1] - split.logits[:, 0]
    likeliest_first = score.argsort(descending=True, stable=True)
    by_group = likeliest_first[split.groups[likeliest_first].argsort(stable=True)]
    _, counts = split.groups[by_group].unique_consecutive(return_counts=True)
    return by_group[counts.cumsum(0) - counts]


def _row_accuracy(split: Answered) -> float:
    return float((split.logits.argmax(-1) == split.labels).double().mean())


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
