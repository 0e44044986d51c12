"""Positions without a target, and a head that need not be computed there.

A language model's loss reads its head's output only where a next token is to be learnt: not at padding, not in a
chat's prompts, not at the last position. What the head computes elsewhere has a residual of exactly zero. Which
positions these are only the loss knows, so that it is the loss that comes in a second form, which computes the head at
targets alone.

Nothing is assumed of a model: that form is used only where its loss and all gradients are those of the plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.cost.batch_shape import BatchShape
from rgft.cost.undisturbed import undisturbed
from rgft.errors import RGFTError
from rgft.execution.agreement import TOLERANCE, Loss, all_close, loss_and_gradients

log = logging.getLogger("rgft")

#: Rows of the batch that the forms are compared on: more would take the memory that is to be saved.
ROWS = 2


def _as_it_is(loss: Loss) -> Loss:
    return loss


def _beside(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


#: Key of a batch under which its `ChosenTargets` are, if not all of its targets are computed and weigh alike.
CHOSEN = "rgft_chosen_targets"


@dataclass(kw_only=True)
class ChosenTargets:
    """Which targets of a batch are computed, and what they weigh. The mean is taken over all of them nevertheless.

    Attributes:
        factors_N: of each target, row after row; 0 is not computed.
        losses_K: set by the loss: of those computed, unweighted and detached.
    """

    factors_N: Tensor
    losses_K: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of computing a loss at its targets alone.

    Attributes:
        loss: model, batch → what the plain loss gives; of a batch with `CHOSEN` targets, what these give.
        fits: model, batch → whether the model is built as this way takes it to be; RGFTError says why not.
        about: what is computed where, in a few words.
    """

    loss: Loss
    fits: Callable[[nn.Module, Any], None]
    about: str


@dataclass(frozen=True, kw_only=True)
class TargetLoss:
    """A loss in the form that computes the head at targets alone.

    Attributes:
        plain: the loss at all positions.
        ways: to compute it otherwise, best first.
        of_one_position: model, batch → a loss of one position of each row, through operations that autograd shows.
            What costs the same whatever the length of a row is what is computed at targets.
        count: targets of a batch.
        count_rows: targets of each of its rows.
        applies: whether a model may be run so now; compiled ones may not.
        placed: makes the run's loss of any of these, on its device and in its precision.
    """

    plain: Loss
    ways: tuple[Way, ...]
    of_one_position: Loss
    count: Callable[[Any], int]
    count_rows: Callable[[Any], list[int]]
    applies: Callable[[nn.Module], bool]
    placed: Callable[[Loss], Loss] = _as_it_is

    def find(self, model: nn.Module, batch: Mapping[str, Any]) -> Loss | None:
        """The first way that gives the plain loss and gradients on rows of `batch`; None where none does.

        Compares in the model's own precision, outside `placed`, and leaves the model as it was.
        """
        reason = self._obstacle(model)
        batch = _beside(model, batch)
        if reason is None:
            shape = BatchShape.of(batch)
            small = shape.resize(batch, BatchShape(rows=min(shape.rows, ROWS), tokens=shape.tokens))
            if not self.count(small):
                small = batch
            if self.count(small):
                return self._proved(model, small)
            reason = "the batch that would show it has no target"
        log.info("positions: the head is computed everywhere: %s", reason)
        return None

    def _obstacle(self, model: nn.Module) -> str | None:
        if not self.applies(model):
            return "the model is compiled"
        coarse = {p.dtype for p in model.parameters()} - TOLERANCE.keys()
        return f"in {', '.join(map(str, coarse))} nothing could be told from rounding" if coarse else None

    def _proved(self, model: nn.Module, batch: Any) -> Loss | None:
        reasons: list[str] = []
        parameters = list(model.parameters())
        with undisturbed(model), torch.enable_grad():
            model.eval()
            plain = loss_and_gradients(model, self.plain, batch, parameters)
            for way in self.ways:
                try:
                    way.fits(model, batch)
                    found = loss_and_gradients(model, way.loss, batch, parameters)
                except (RGFTError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                    reasons.append(f"{way.about}: {error}")
                    continue
                if all_close(found, plain):
                    self._say(way, reasons)
                    return self.placed(way.loss)
                reasons.append(f"{way.about}: loss or gradients differ")
        log.info("positions: the head is computed everywhere: %s", "; ".join(reasons))
        return None

    def _say(self, way: Way, reasons: list[str]) -> None:
        not_so = f" (not {'; '.join(reasons)})" if reasons else ""
        log.info("positions: the head is computed at targets alone, %s%s", way.about, not_so)
