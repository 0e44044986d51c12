"""What a task brings to a run: model, data, loss and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rgft.batches import SizedDataset
from rgft.evaluation import Metric
from rgft.execution.target_positions import TargetLoss

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def number_of_examples(batch: Mapping[str, Any]) -> int:
    """The weight of a batch whose loss is a mean over examples."""
    return len(batch["labels"])


@dataclass(kw_only=True)
class PreparedTask:
    """A task ready to be trained.

    Attributes:
        model: on the CPU; a run moves it.
        processor: tokenizer or image processor, saved beside the model; None without one.
        train, validation, test: map-style datasets of plain dicts, tokenised and unpadded; validation and test may be
            None.
        collate: list of examples → batch of tensors with `labels`.
        loss: (model, batch) → losses per example [B], whose mean is what is trained.
        loss_at_targets: the loss of a language model in the form that computes the head only where a token is learnt.
        metric: makes an empty accumulator of metrics.
        weight: of a batch in a split's mean loss: the number of its examples, or of the tokens it predicts.
        primary_metric: the one that is quoted first.
        judge: model → what else the bench measures on the test split, by what the model generates; None: nothing.
        judged_on: what the judge goes by that no split shows, as texts: whether it is the same can be told.
        judged_details: what became of each thing that was judged, fit for JSON; filled when the judge is asked.
        label_names: class names by label, for classification.
    """

    model: nn.Module
    processor: Any
    train: SizedDataset
    validation: SizedDataset | None
    test: SizedDataset | None
    collate: Callable[[list[Any]], dict[str, Tensor]]
    loss: Loss
    metric: Callable[[], Metric]
    loss_at_targets: TargetLoss | None = None
    weight: Callable[[Mapping[str, Any]], int] = number_of_examples
    primary_metric: str = "accuracy"
    judge: Callable[[nn.Module], dict[str, float]] | None = None
    judged_on: SizedDataset | None = None
    judged_details: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] = field(default_factory=tuple)
