"""The loss of next-token prediction, and batches for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.tasks.base import PreparedTask
from rgft.tasks.models import load_causal_lm, require_positions

#: Label of a position that is not learnt (PyTorch's default for cross-entropy).
IGNORED = -100


def token_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Losses per example [B] whose mean is the mean over all target tokens of the batch.

    l_i = B/N · Σ_t −log p(y_it | y_i,<t), with N the batch's target tokens: examples with more of them weigh more, as
    in the usual loss of a batch. In fp32. A batch without targets has loss 0.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits  # fmt: skip
    losses, targets = _negative_log_likelihoods(logits, batch["labels"])
    return losses.sum(1) * (len(losses) / targets.sum().clamp(min=1))


def _negative_log_likelihoods(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per position t [B, T] −log p(y_{t+1} | y_≤t), 0 where nothing is learnt; and where something is."""
    # The labels are shifted, not the logits: those are the largest tensor there is, and a slice would be copied.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(following.shape), following != IGNORED


def number_of_targets(batch: Mapping[str, Any]) -> int:
    """How many tokens the batch predicts. The first of an example is never predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class TokenMetric:
    """Perplexity and the share of target tokens that are the likeliest; sums over batches, logits are not kept."""

    def __init__(self) -> None:
        self._loss, self._right, self._targets = 0.0, 0, 0

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        labels = batch["labels"].to(logits.device)
        for row in range(len(logits)):  # by row: a vocabulary's fp32 logits of a whole batch may be gigabytes
            mine, its = logits[row : row + 1], labels[row : row + 1]
            losses, targets = _negative_log_likelihoods(mine, its)
            self._loss += float(losses.double().sum())
            self._right += int(((mine[:, :-1].argmax(-1) == its[:, 1:]) & targets[:, :-1]).sum())
            self._targets += int(targets.sum())

    def compute(self) -> dict[str, float]:
        if not self._targets:
            return {}
        mean = torch.tensor(self._loss / self._targets, dtype=torch.float64)
        return {"perplexity": float(mean.exp()), "token_accuracy": self._right / self._targets}


class TokenCollator:
    """Pads on the right to the longest of the batch; padding is neither attended to nor learnt.

    Args:
        pad_token_id: what padding is filled with.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORED),
        }


def token_task(model: str, tokenizer: Any, data: Mapping[str, Sequence[Mapping[str, Any]]]) -> PreparedTask:
    """A causal language model on encoded examples.

    Args:
        model: hub name or folder.
        tokenizer: of the model.
        data: split → examples with `input_ids` and `labels`; "train", "validation" and perhaps "test".

    Raises:
        DataError: the model cannot be loaded, or has fewer positions than an example has tokens.
    """
    network = load_causal_lm(model, pad_token_id=tokenizer.pad_token_id)
    require_positions(network, (example["input_ids"] for split in data.values() for example in split))
    return PreparedTask(
        model=network, processor=tokenizer, train=data["train"], validation=data["validation"], test=data.get("test"),
        collate=TokenCollator(tokenizer.pad_token_id), loss=token_losses, metric=TokenMetric, weight=number_of_targets,
        primary_metric="perplexity",
    )  # fmt: skip
