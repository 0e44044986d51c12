"""The head of a language model."""

from __future__ import annotations

from torch import nn


def output_head(model: nn.Module) -> nn.Module | None:
    """What turns a language model's last hidden states into logits over its vocabulary; None: the model names none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, nn.Module) else None
