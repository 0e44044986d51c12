"""What a task brings to a run: model, data, loss and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rgft.batches import SizedDataset

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Metrics = Callable[[Tensor, Tensor], dict[str, float]]


@dataclass(kw_only=True)
class PreparedTask:
    """A task ready to be trained.

    Attributes:
        model: on the CPU; a run moves it.
        processor: tokenizer or image processor, saved beside the model; None without one.
        train, validation, test: map-style datasets of plain dicts, tokenised and unpadded; validation and test may be
            None.
        collate: list of examples → batch of tensors with `labels`.
        loss: (model, batch) → losses per example [B].
        metrics: (logits, labels) of a whole split → name → value.
        primary_metric: the one that is quoted first.
        label_names: class names by label, for classification.
    """

    model: nn.Module
    processor: Any
    train: SizedDataset
    validation: SizedDataset | None
    test: SizedDataset | None
    collate: Callable[[list[Any]], dict[str, Tensor]]
    loss: Loss
    metrics: Metrics
    primary_metric: str = "accuracy"
    label_names: tuple[str, ...] = field(default_factory=tuple)
