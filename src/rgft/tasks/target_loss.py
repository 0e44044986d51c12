"""The loss of next-token prediction with the language model's head at targets alone.

The model runs as ever, but its head is given other positions than the decoder's: those with a target, and what follows
the head in the model's forward (a soft cap, a scale) applies to them; or none at all, where the head is a linear layer
whose output are the logits, and these are computed a few positions at a time behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.architectures.output_head import output_head
from rgft.errors import RGFTError
from rgft.execution.chunked_loss import chunked_cross_entropy
from rgft.execution.eager import is_compiled
from rgft.execution.target_positions import CHOSEN, ChosenTargets, TargetLoss, Way
from rgft.tasks.token_loss import IGNORED, following, number_of_targets, targets_of_rows, token_losses, wide

Select = Callable[[Tensor], Tensor]


def chunked_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`token_losses` [B], never more than a chunk of logits at a time."""
    head = _head(model)
    if not _is_linear(head):  # hooked or adapted since
        return gathered_losses(model, batch)
    targets = _targets(batch)
    hidden_BTH, _ = _run(model, batch, lambda hidden_BTH: hidden_BTH[:, :0])
    hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, targets.index_N)
    bias_V: Any = head.bias
    losses_N = chunked_cross_entropy(
        hidden_NH, _weight(head), bias_V, targets.tokens_N, factors_N=targets.factors_N
    )  # fmt: skip
    return targets.by_example(losses_N, batch)


def gathered_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`token_losses` [B], with the logits of all targets at once."""
    targets = _targets(batch)
    logits_NV = _logits(model, batch, targets.index_N)
    losses_N = functional.cross_entropy(wide(logits_NV), targets.tokens_N, reduction="none")
    return targets.by_example(losses_N if targets.factors_N is None else losses_N * targets.factors_N, batch)


def losses_of_one_position(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A loss [B] of each row's first position alone; costs are read off it."""
    rows, tokens = batch["input_ids"].shape
    index_B = torch.arange(rows, device=batch["input_ids"].device) * tokens
    logits_BV = _logits(model, batch, index_B)
    return functional.cross_entropy(wide(logits_BV), batch["input_ids"][:, 0], reduction="none")


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """The targets that are computed.

    Attributes:
        index_N: the position that predicts each of them, row after row.
        tokens_N: the token.
        number: of all targets of the batch.
        factors_N: what each weighs; None: 1.
        chosen: who chose them; None: they are all.
    """

    index_N: Tensor
    tokens_N: Tensor
    number: int
    factors_N: Tensor | None = None
    chosen: ChosenTargets | None = None

    def by_example(self, losses_N: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Losses per example [B] from weighted ones of targets."""
        if self.chosen is not None and self.factors_N is not None:
            self.chosen.losses_K = losses_N.detach() / self.factors_N
        rows, tokens = batch["input_ids"].shape
        # Laid out and summed as the plain loss is: on an accelerator, adding up by index would depend on chance.
        losses_BT = losses_N.new_zeros(rows * tokens).index_copy(0, self.index_N, losses_N).view(rows, tokens)
        return losses_BT.sum(1) * (rows / max(1, self.number))


def _targets(batch: Mapping[str, Any]) -> _Targets:
    tokens = following(batch["labels"]).flatten()
    index_N = (tokens != IGNORED).nonzero().squeeze(1)
    number, chosen = len(index_N), batch.get(CHOSEN)
    if not isinstance(chosen, ChosenTargets):
        return _Targets(index_N=index_N, tokens_N=tokens[index_N], number=number)
    kept_K = (chosen.factors_N > 0.0).nonzero().squeeze(1)
    index_K = index_N[kept_K.to(index_N.device)]
    factors_K = chosen.factors_N[kept_K].to(index_N.device)
    return _Targets(index_N=index_K, tokens_N=tokens[index_K], number=number, factors_N=factors_K, chosen=chosen)


def _logits(model: nn.Module, batch: Mapping[str, Any], index_N: Tensor) -> Tensor:
    """Logits [N, V] at these positions, as the model makes them."""
    _, output = _run(model, batch, lambda hidden_BTH: hidden_BTH.flatten(0, 1).index_select(0, index_N)[None])
    return output.logits[0]


def _run(model: nn.Module, batch: Mapping[str, Any], select: Select) -> tuple[Tensor, Any]:
    """Runs the model with its head on selected positions.

    Returns:
        What the decoder handed to the head [B, T, H], and the model's output.

    Raises:
        RGFTError: the head was not called exactly once, or not with the hidden states of all positions alone.
    """
    seen: list[Tensor] = []

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        (hidden_BTH,) = (*args, *kwargs.values())
        seen.append(hidden_BTH)
        return (select(hidden_BTH),), {}

    handle = _head(model).register_forward_pre_hook(narrow, with_kwargs=True)
    try:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:2] != batch["input_ids"].shape:
        raise RGFTError(
            f"expected one call of the language model's head on {tuple(batch['input_ids'].shape)} positions, found "
            f"{[tuple(hidden.shape) for hidden in seen]}; set execution.positions=all"
        )
    return seen[0], output


def _head(model: nn.Module) -> nn.Module:
    head = output_head(model)
    if head is None:
        raise RGFTError(f"{type(model).__name__} names no head (get_output_embeddings)")
    return head


def _weight(head: nn.Module) -> Tensor:
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_linear(head: nn.Module) -> bool:
    """Whether the head does nothing else; adapters, quantised and split weights have classes of their own."""
    return type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)


def _fits_linear_head(model: nn.Module, batch: Mapping[str, Any]) -> None:
    head = _head(model)
    if not _is_linear(head):
        raise RGFTError(f"the head is a {type(head).__name__}, or has hooks")
    outputs: list[Any] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        _, output = _run(model, batch, lambda hidden_BTH: hidden_BTH[:, :1])
    finally:
        handle.remove()
    # By numbers a soft cap might not show yet: it bends large logits, and a fresh model's are small.
    if output.logits is not outputs[0]:
        raise RGFTError("the logits are not the head's output as it is")


def _fits_any_head(model: nn.Module, batch: Mapping[str, Any]) -> None:
    _head(model)


def _is_eager(model: nn.Module) -> bool:
    return not is_compiled(model)


TOKEN_LOSS_AT_TARGETS = TargetLoss(
    plain=token_losses,
    ways=(
        Way(loss=chunked_losses, fits=_fits_linear_head, about="in chunks"),
        Way(loss=gathered_losses, fits=_fits_any_head, about="all of them at once"),
    ),
    of_one_position=losses_of_one_position, count=number_of_targets, count_rows=targets_of_rows,
    applies=_is_eager,
)  # fmt: skip
