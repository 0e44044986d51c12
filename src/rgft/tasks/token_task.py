"""What the tasks of decoders share: a model that predicts next tokens, on encoded examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rgft.tasks.base import PreparedTask
from rgft.tasks.models import load_causal_lm, require_positions
from rgft.tasks.target_loss import TOKEN_LOSS_AT_TARGETS
from rgft.tasks.token_loss import TokenCollator, TokenMetric, number_of_targets, token_losses


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
    require_positions(network, max(len(example["input_ids"]) for split in data.values() for example in split))
    return PreparedTask(
        model=network, processor=tokenizer, train=data["train"], validation=data["validation"], test=data.get("test"),
        collate=TokenCollator(tokenizer.pad_token_id), loss=token_losses, loss_at_targets=TOKEN_LOSS_AT_TARGETS,
        metric=TokenMetric, weight=number_of_targets, primary_metric="perplexity",
    )  # fmt: skip
