"""The loss of a batch: by default the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from rgft.errors import ConfigError

#: model, batch → scalar.
Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own `.loss` (Transformers' convention): a scalar, so examples cannot be told apart.

    Raises:
        ConfigError: the batch names no arguments, or the model returned no loss for it.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a batch of type {type(batch).__name__} needs loss=(model, batch) → scalar (of a guide, also one loss per "
            "example): only a mapping names the model's arguments"
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ConfigError(
            f"{type(model).__name__} returned no loss for a batch with {', '.join(map(str, batch))}; "
            "add labels to the batch or pass loss=(model, batch) → scalar"
        )
    return loss
