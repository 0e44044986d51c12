"""Well-learnt examples skipped in a Trainer: rows taken out of its batches, and the others weighed in its loss.

A Trainer's loss is a mean. Losses of single examples are read off the model's logits instead, in the forms that
Transformers' models use, and only where these give the Trainer's own loss. A step in which nothing is skipped has that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from rgft.cost.undisturbed import undisturbed
from rgft.errors import AttachError, ConfigError
from rgft.integrations.trainer_data import LoaderStream
from rgft.pruning import ExamplePruning, KeptRows
from rgft.weighted_loss import WeightedLoss

IGNORED = -100
#: Key of a batch under which its `KeptRows` are.
KEPT = "rgft_kept_rows"
#: Relative difference to the Trainer's own loss that rounding may make.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
COARSE_TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True)
class ExampleLosses:
    """Losses of a batch's examples.

    Attributes:
        sums_B: over what each of them counts.
        counts: 1, or its target tokens.
    """

    sums_B: Tensor
    counts: Sequence[int]


def counts_of(labels: Any) -> list[int]:
    """What each row counts in a mean of losses: its target tokens where labels are tokens, else 1."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return (labels[:, 1:] != IGNORED).sum(1).tolist()
    return [1] * len(labels)


def example_losses(logits: Any, labels: Any) -> ExampleLosses | None:
    """By the shapes of logits and labels: classes, numbers, or next tokens; None where they fit none of these."""
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return None
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = counts_of(labels)
    if labels.is_floating_point():
        if logits.dim() != 2 or labels.numel() != logits.numel():
            return None
        return ExampleLosses(sums_B=(wide - labels.view(logits.shape)).square().mean(1), counts=counts)
    if logits.dim() == 2 and labels.shape == logits.shape[:1]:
        return ExampleLosses(sums_B=functional.cross_entropy(wide, labels, reduction="none"), counts=counts)
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        losses = functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return ExampleLosses(sums_B=losses.view(targets.shape).sum(1), counts=counts)
    return None


def is_sum_over(losses: ExampleLosses | None, loss: Tensor, count: float) -> bool:
    """Whether a Trainer's loss is the examples' sum over `count`. Waits for the device."""
    if losses is None:
        return False
    own, found = float(loss.detach()), float(losses.sums_B.detach().sum()) / max(1.0, count)
    return abs(own - found) <= TOLERANCE.get(loss.dtype, COARSE_TOLERANCE) * max(abs(own), 1e-3)


def not_by_example() -> AttachError:
    """What is said where the Trainer's loss is of another form."""
    return AttachError(
        "examples.prune: expected the Trainer's loss to be the mean of cross-entropies of classes or next tokens, or "
        "of squared errors, which is read off `logits` and `labels` for each example; found another (label smoothing, "
        "class weights, an auxiliary or a fused loss?). Set examples.prune to 0, or use a plain loop with "
        "rgft.Guide(model, config, loss=<losses per example>)"
    )


def rows_of(batch: Mapping[str, Any], kept: KeptRows, ids: Sequence[int]) -> dict[str, Any]:
    """The kept rows of a batch. What only the others' length had padded is cut off, as if collated without them."""
    chosen = set(kept.ids)
    rows = [row for row, example in enumerate(ids) if example in chosen]
    if len(rows) == len(ids):
        return dict(batch)

    def some(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == len(ids):
            return value[rows]
        return [value[row] for row in rows] if isinstance(value, list) and len(value) == len(ids) else value

    smaller = {key: some(value) for key, value in batch.items()}
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.bool().all(1).any()):
        return smaller  # padded to more than the longest row: on purpose
    is_used = smaller["attention_mask"].bool().any(0).nonzero().squeeze(1)
    span, width = slice(int(is_used[0]), int(is_used[-1]) + 1), mask.shape[1]
    return {
        key: value[:, span] if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width else value
        for key, value in smaller.items()
    }


class TrainerPruning:
    """Takes well-learnt examples out of a Trainer's batches after they were loaded, and weighs the others' losses.

    Args:
        trainer: of the run.
        weighted: the guide's.
        examples: its pruning.

    Raises:
        ConfigError: batches have one row, or rows of batches are no examples.
        AttachError: the Trainer's loss is not the mean of losses that can be read off for each example.
    """

    def __init__(
        self, trainer: Trainer, weighted: WeightedLoss, examples: ExamplePruning, stream: LoaderStream, *,
        obstacle: str | None,
    ) -> None:  # fmt: skip
        problems = [] if obstacle is None else [f"examples.prune: {obstacle}"]
        if trainer.args.per_device_train_batch_size == 1:
            problems.append(
                "examples.prune: expected batches of 2 or more examples, found per_device_train_batch_size 1: at least "
                "one row of a batch is kept, so that nothing would be skipped"
            )
        if problems:
            raise ConfigError(problems)
        self._trainer, self._weighted, self._examples = trainer, weighted, examples
        self._ids: Sequence[int] | None = None  # of the pass in hand; None: it is no training pass
        self._divides_by_items: bool | None = None  # found out at the first step
        examples.begin(len(stream.dataset))
        self._check_loss(stream.load(next(stream.indices())))

    def _check_loss(self, batch: Any) -> None:
        trainer, model = self._trainer, self._trainer.model
        assert isinstance(model, nn.Module)
        with undisturbed(model), torch.no_grad(), trainer.compute_loss_context_manager():
            model.eval()
            inputs = dict(trainer._prepare_inputs(batch))
            found = cast("Any", trainer.compute_loss(model, dict(inputs), return_outputs=True))
            losses = example_losses(_logits(found[1]), inputs.get("labels"))
        if not is_sum_over(losses, found[0], 0 if losses is None else sum(losses.counts)):
            raise not_by_example()

    def thin(self, batches: Sequence[Any], ids: Sequence[Sequence[int]], *, epoch: int) -> list[Any]:
        """The batches of a step with what is kept of them, each with its `KEPT`."""
        self._examples.begin_epoch(epoch)
        self._examples.has_ended()
        thinner: list[Any] = []
        for batch, its_ids in zip(batches, ids, strict=True):
            kept = self._examples.kept(its_ids)
            thinner.append({**rows_of(batch, kept, its_ids), KEPT: kept})
        return thinner

    @contextmanager
    def training(self, ids: Sequence[int]) -> Iterator[None]:
        """Inside, `compute_loss` is that of a training pass over these rows."""
        self._ids = ids
        try:
            yield
        finally:
            self._ids = None

    def compute_loss(self, original: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loss; in a training pass weighed, and its examples' losses remembered."""
        if self._ids is None:
            return original(model, inputs, *args, **kwargs)
        given = dict(zip(("return_outputs", "num_items_in_batch"), args, strict=False)) | kwargs
        ids, labels, items = self._ids, inputs.get("labels"), given.get("num_items_in_batch")
        counts = counts_of(labels)
        self._weighted.note_skipped(ids, counts)
        loss, outputs = original(model, dict(inputs), return_outputs=True, num_items_in_batch=items)
        losses = example_losses(_logits(outputs), labels)
        if losses is None:
            raise not_by_example()
        if self._divides_by_items is None:
            self._divides_by_items = self._divisor(losses, loss, items)
        sums_B, weights_B = losses.sums_B, self._weighted.weights(ids)
        self._weighted.observe(ids, sums_B.detach(), [1.0 / max(1, count) for count in counts], counts)
        if weights_B is not None:
            whole: Any = items if self._divides_by_items else max(1, self._weighted.nominal_count(ids, counts)[1])
            loss = (sums_B * weights_B.to(sums_B.device)).sum() / whole
        return (loss, outputs) if given.get("return_outputs") else loss

    def _divisor(self, losses: ExampleLosses, loss: Tensor, items: Any) -> bool:
        """Whether the loss is divided by the items of all batches of the step; else by its own batch's."""
        if is_sum_over(losses, loss, sum(losses.counts)):
            # The same where a step has one batch, so that either will do for it.
            return items is not None and is_sum_over(losses, loss, float(items))
        if items is None or not is_sum_over(losses, loss, float(items)):
            raise not_by_example()
        return True


def _logits(outputs: Any) -> Any:
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
