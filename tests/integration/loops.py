"""Data sets made of a family's batches, and the loops that tests compare: a guide's, and a plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import rgft
from rgft.guide import Guide
from tests.families import Family, loss_of

Example = dict[str, Tensor]


class Examples:
    """`count` examples of a family, as single rows."""

    def __init__(self, family: Family, count: int = 24, tokens: int = 12) -> None:
        self.rows: list[Example] = []
        for seed in range(-(-count // 4)):
            batch = family.batch(rows=4, tokens=tokens, seed=seed)
            self.rows += [{key: value[row] for key, value in batch.items()} for row in range(4)]
        del self.rows[count:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


def collate(examples: Sequence[Example]) -> Example:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def trimmed(examples: Sequence[Example]) -> Example:
    """Padded to the longest row of the batch only, as collators do."""
    batch = collate(examples)
    tokens = int(batch["attention_mask"].sum(1).max())
    width = batch["input_ids"].shape[1]
    return {k: v[:, :tokens] if v.dim() == 2 and v.shape[1] == width else v for k, v in batch.items()}


def example_losses(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of each example [B]."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def adamw(guide: Guide, lr: float = 1e-2, weight_decay: float = 0.0, *, fused: bool | None = None) -> AdamW:
    return AdamW(guide.param_groups(lr=lr, weight_decay=weight_decay), lr=lr, fused=fused)


def plain_adamw(model: nn.Module, lr: float = 1e-2, weight_decay: float = 0.0) -> AdamW:
    """As users write it: weights decay, biases and norms do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return AdamW(
        [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=lr,
    )


def guided(
    guide: Guide, optimizer: Optimizer, data: Examples, *, steps: int | None = None, batch_size: int = 4,
    epochs: float = 1, accumulation: int = 1, clip: float | None = None, collate_fn: Callable[..., Any] = collate,
    scheduler: Any = None, after_step: Callable[[Guide], None] | None = None,
) -> tuple[list[Any], list[float]]:  # fmt: skip
    """Trains through the guide; returns the batches and the losses of all passes."""
    batches: list[Any] = []
    losses: list[float] = []
    for batch in guide.batches(data, batch_size=batch_size, collate_fn=collate_fn, epochs=epochs):
        batches.append(batch)
        loss = guide.loss(batch)
        (loss / accumulation).backward()
        losses.append(float(loss.detach()))
        if len(batches) % accumulation == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(guide.model.parameters(), clip)
            guide.step(optimizer, scheduler)
            optimizer.zero_grad()
            if after_step is not None:
                after_step(guide)
            if steps is not None and guide.step_count >= steps:
                break
    return batches, losses


def plain(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], *, accumulation: int = 1, clip: float | None = None
) -> None:
    for position, batch in enumerate(batches, start=1):
        (loss_of(model, batch) / accumulation).backward()
        if position % accumulation == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    left, right = found.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    different = [key for key, value in right.items() if not torch.equal(left[key], value)]
    assert not different


def weights_of(guide: Guide) -> dict[str, list[Tensor]]:
    """Copies of every component's parameters."""
    return {c.name: [p.detach().clone() for p in parameters] for c, parameters in guide._binding}


def changed(guide: Guide, before: dict[str, list[Tensor]]) -> set[str]:
    """Names of the components of which any element is not what it was."""
    after = weights_of(guide)
    return {
        name
        for name, parts in before.items()
        if any(not torch.equal(a, b) for a, b in zip(parts, after[name], strict=True))
    }


def config(**settings: Any) -> rgft.Config:
    return rgft.Config(**settings)


def without_dropout(model: nn.Module) -> nn.Module:
    """The reference knows no frozen prefix, which runs in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
