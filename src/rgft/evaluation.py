"""Evaluating a task's model on a split: mean loss and metrics, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rgft.batches import SizedDataset, is_uniform


class Metric(Protocol):
    """Accumulates over the batches of a split."""

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        """Takes one batch: the model's logits, and the collated batch on the CPU."""
        ...

    def compute(self) -> dict[str, float]:
        """Name → value over all batches; undefined values are left out."""
        ...


#: Is shown each batch: places of its examples in the split, their losses, the model's logits, the batch on the CPU.
Observer = Callable[[Sequence[int], Tensor, Tensor, Mapping[str, Any]], None]


class Evaluated(Protocol):
    """What an evaluation needs of a task; see `rgft.tasks.base.PreparedTask`."""

    model: nn.Module
    collate: Callable[[list[Any]], Any]
    metric: Callable[[], Metric]
    weight: Callable[[Mapping[str, Any]], int]


@torch.no_grad()
def evaluate(
    task: Evaluated, dataset: SizedDataset, *, batch_size: int, loss: Callable[[nn.Module, Any], Tensor],
    observer: Observer | None = None,
) -> dict[str, float]:  # fmt: skip
    """Evaluates in order of length where examples have one (less padding); only rounding depends on it.

    Args:
        task: model, collation and metrics.
        dataset: the split.
        batch_size: examples per forward pass.
        loss: (model, batch) → losses whose mean is the batch's loss.
        observer: is shown every batch that has something to be predicted.

    Returns:
        "loss": mean over what the task's `weight` counts (examples, or target tokens); and what its metric gives.
    """
    model, metric = task.model, task.metric()
    was_training = model.training
    model.eval()
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    total, weights = 0.0, 0
    try:
        for indices in _by_length(dataset, batch_size):
            batch = task.collate([dataset[i] for i in indices])
            weight = task.weight(batch)
            if weight == 0:  # nothing to be predicted: the mean would be 0/0
                continue
            losses = loss(model, batch)
            total += float(losses.double().mean()) * weight
            weights += weight
            logits = _logits(outputs.pop())
            metric.update(logits, batch)
            if observer is not None:
                observer(indices, losses, logits, batch)
            outputs.clear()
    finally:
        handle.remove()
        model.train(was_training)
    return {"loss": total / weights if weights else float("nan"), **metric.compute()}


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _by_length(dataset: SizedDataset, batch_size: int) -> Iterator[list[int]]:
    def length(index: int) -> int:
        example = dataset[index]
        ids = example.get("input_ids") if isinstance(example, Mapping) else None
        return len(ids) if ids is not None else 0

    order = list(range(len(dataset)))
    if not is_uniform(dataset):
        order.sort(key=length)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
