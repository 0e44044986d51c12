"""FAIT: of a correct program, tokens in which a similar incorrect one differs weigh more in the loss. Code only.

Fan et al., "FAIT: Fault-Aware Fine-Tuning for Better Code Generation", 2025 (arXiv:2503.16913). Its loss is
Σ_j −w_j log P(token j) over the correct program, with a larger w_j where a token is sensitive: one number here. The
paper's changes along training with how the model takes both programs. `rgft.bench.tasks.pairs` finds the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgft.bench.methods.base import Method, variants_of
from rgft.bench.tasks.pairs import SENSITIVE
from rgft.errors import DataError
from rgft.execution.agreement import Loss
from rgft.tasks.token_loss import IGNORED, following, wide

#: How much error-sensitive tokens weigh, others weighing 1.
WEIGHT = 2.0


def fault_aware_losses(model: nn.Module, batch: Mapping[str, Any], *, weight: float = WEIGHT) -> Tensor:
    """Losses per example [B] whose mean is the weighted mean over all target tokens of the batch.

    Raises:
        DataError: the batch does not say which tokens are error-sensitive.
    """
    if SENSITIVE not in batch or batch["labels"].dim() != 2:
        raise DataError(
            f"FAIT: expected batches of programs with {SENSITIVE!r} [rows, tokens] beside their labels, found "
            f"{', '.join(batch)}; it trains on pairs of a correct and an incorrect program (the task `code` with "
            "train_problems), and on no other task"
        )
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets_BT = following(batch["labels"])
    losses = nn.functional.cross_entropy(
        wide(logits_BTV.flatten(0, 1)), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets_BT.shape)
    marked = nn.functional.pad(batch[SENSITIVE][:, 1:], (0, 1)).bool()
    weights_BT = torch.where(marked, weight, 1.0) * (targets_BT != IGNORED)
    return (losses * weights_BT).sum(1) * (len(losses) / weights_BT.sum().clamp(min=1.0))


def _weighted(plain: Loss, settings: Mapping[str, Any]) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return fault_aware_losses(model, batch, weight=settings["weight"]) if model.training else plain(model, batch)

    return loss


METHOD = Method(
    name="fait", title="FAIT: error-sensitive tokens weigh more (code)", source="Fan et al. 2025 (arXiv:2503.16913)",
    config={"preset": "full"}, loss=_weighted, cost="nothing", settings={"weight": WEIGHT},
    variants=variants_of("weight", 1.5, 4.0),
)  # fmt: skip
