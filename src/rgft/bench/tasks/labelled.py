"""Texts, or pairs of texts, with labels, and any encoder: what the tasks of GLUE and SuperGLUE have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.bench.tasks.splits import drawn
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import model_folder
from rgft.tasks.models import load_classifier, load_tokenizer
from rgft.tasks.text_classification import collate


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A row.

    Attributes:
        texts: one or two.
        label: a class, or a number to be predicted.
        group: rows of one group are scored together (the answers to a question); -1: alone.
        worth: how nearly right its group's answer is if it is this row, 0…1, where that is not all or nothing.
    """

    texts: tuple[str, ...]
    label: float
    group: int = -1
    worth: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A whole split and what a model made of it; `groups` and `worths` as in `Labelled`.

    Attributes:
        logits: [N, C], or [N, 1] where numbers are predicted.
        labels, groups, worths: [N].
    """

    logits: Tensor
    labels: Tensor
    groups: Tensor
    worths: Tensor

    @classmethod
    def one_by_one(cls, logits: Tensor, labels: Tensor) -> Answered:
        """Of rows that belong to no group."""
        alone, nothing = torch.full((len(labels),), -1), torch.zeros(len(labels))
        return cls(logits=logits, labels=labels, groups=alone, worths=nothing)


#: Of a split → name → value.
Scores = Callable[[Answered], dict[str, float]]

#: What is in a batch beside the model's inputs.
_BESIDE = ("labels", "groups", "worths")


def _own(splits: Mapping[str, Sequence[Labelled]]) -> tuple[str, ...]:
    """What examples have beside texts and labels; worths only where there are some: examples are fingerprinted."""
    has_worths = any(row.worth for rows in splits.values() for row in rows)
    return ("groups", "worths") if has_worths else ("groups",)


def labelled_task(
    splits: Mapping[str, Sequence[Labelled]], *, names: tuple[str, ...], scores: Scores, train_size: int, seed: int,
    model: str | None, max_tokens: int, primary_metric: str,
) -> PreparedTask:  # fmt: skip
    """An encoder with a new classifier.

    Args:
        splits: "train" (what the training set is drawn from), "validation", "test".
        names: of the classes; none for numbers.
        scores: of a split.
        train_size: rows to draw.
        seed: of the draw and of the new classifier.
        model: hub name or folder; None: the packaged encoder.
        max_tokens: of a text or pair; longer ones are cut.
        primary_metric: the one that is quoted first.

    Raises:
        DataError: the model cannot be loaded, or there are fewer rows than `train_size`.
    """
    name = str(model_folder()) if model is None else model
    tokenizer = load_tokenizer(name)
    kind: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    network = load_classifier(
        name, labels=len(names) or 1, seed=seed, pad_token_id=tokenizer.pad_token_id,
        **(kind if names else {"problem_type": "regression"}),
    )  # fmt: skip
    own = _own(splits)
    rows = {**splits, "train": drawn(splits["train"], train_size, seed=seed, what="rows")}

    def encoded(some: Sequence[Labelled]) -> list[dict[str, Any]]:
        # One by one: a list of pairs would be taken for words.
        inputs = [tokenizer(*row.texts, truncation=True, max_length=max_tokens) for row in some]
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in inputs[0]]
        return [
            {
                **{key: ids[key] for key in keys}, "labels": int(row.label) if names else row.label,
                **{key: {"groups": row.group, "worths": row.worth}[key] for key in own},
            }
            for ids, row in zip(inputs, some, strict=True)
        ]  # fmt: skip

    def batched(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{key: value for key, value in example.items() if key not in own} for example in examples]
        return {
            **collate(tokenizer, inputs),
            **{key: torch.tensor([example[key] for example in examples]) for key in own},
        }

    return PreparedTask(
        model=network, processor=tokenizer, train=encoded(rows["train"]), validation=encoded(rows["validation"]),
        test=encoded(rows["test"]), collate=batched, loss=_class_loss if names else _number_loss,
        metric=partial(_Grouped, scores), primary_metric=primary_metric, label_names=names,
    )  # fmt: skip


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in _BESIDE}


def _class_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example, [B]."""
    return functional.cross_entropy(model(**_inputs(batch)).logits.float(), batch["labels"], reduction="none")


def _number_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Squared error of each example, [B]."""
    return (model(**_inputs(batch)).logits.float().squeeze(-1) - batch["labels"].float()).square()


class _Grouped:
    """Keeps all logits of a split, and what is beside its inputs."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self._rows: list[tuple[Tensor, ...]] = []

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        rows = {"worths": torch.zeros(len(logits)), **batch}
        self._rows.append((logits.float().cpu(), *(rows[key].cpu() for key in _BESIDE)))

    def compute(self) -> dict[str, float]:
        if not self._rows:
            return {}
        logits, labels, groups, worths = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        return self._scores(Answered(logits=logits, labels=labels, groups=groups, worths=worths))
