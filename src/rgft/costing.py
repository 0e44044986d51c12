"""What steps of a run cost, and which positions they need not compute: found out before the first step, on a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

from torch import nn

from rgft.cost import CostModel, trace_costs, with_targets
from rgft.cost.rates import measure_products
from rgft.errors import ConfigError
from rgft.execution.binding import Binding
from rgft.execution.dropout import Dropout
from rgft.execution.eager import is_compiled
from rgft.execution.executor import Executor
from rgft.execution.linear import layout_of
from rgft.execution.read_positions import ReadPositions
from rgft.execution.sampled_rows import SampledRows, find_sampled
from rgft.training_loss import Loss, TrainingLoss

log = logging.getLogger("rgft")


def traced_costs(
    model: nn.Module, binding: Binding, executor: Executor, loss: TrainingLoss, example: Any, *, of: Loss, proves: bool,
    dropout: Dropout | None = None, sampled: float = 1.0, seed: int = 0,
) -> CostModel:  # fmt: skip
    """Costs of any plan; finds on the way which positions the last layer, or the head, need not compute.

    Args:
        model, binding: what is trained.
        executor: told which positions of the last layer steps may skip.
        loss: told whether steps may compute the head at targets alone.
        example: a batch.
        of: the loss that is traced.
        proves: whether it is the one of the steps, and may tell what these need not compute.
        dropout: what steps may be made without; None: all are made with the model's own.
        sampled: share of the positions that weight gradients are made from.
        seed: of the draws.
    """
    if executor.sampled is not None:
        executor.sampled.detach()
        executor.sampled = None
    drawn = _drawn(model, binding, example, of) if sampled < 1.0 else []
    costs = _traced(model, binding, executor, loss, example, of=of, proves=proves, dropout=dropout, drawn=drawn)
    if drawn:
        executor.sampled = SampledRows(model, drawn, sampled, seed)
    return costs.with_sampling(sampled)


def _drawn(model: nn.Module, binding: Binding, example: Any, of: Loss) -> list[str]:
    """Modules whose weight gradients are made from a sample of the positions.

    Raises:
        ConfigError: the model is compiled.
    """
    if is_compiled(model):
        raise ConfigError(
            "update.sample: expected a model that is not compiled, whose graph would leave the draws out; found a "
            "compiled one: leave torch.compile or update.sample out"
        )
    with binding.plain():
        found = find_sampled(model, binding.partition, example, of)
    if not found:
        log.info("positions: all make weight gradients: no linear layer sees several of an example")
    return found


def _traced(
    model: nn.Module, binding: Binding, executor: Executor, loss: TrainingLoss, example: Any, *, of: Loss, proves: bool,
    dropout: Dropout | None, drawn: Collection[str],
) -> CostModel:  # fmt: skip
    low_rank = binding.low_rank

    def traced(of: Loss = of) -> CostModel:
        return trace_costs(
            model, binding.partition, example, loss=of, is_sliceable=lambda module: layout_of(module) is not None,
            pairs=None if low_rank is None else low_rank.shapes,
            without_dropout=None if dropout is None else dropout.left_out, drawn=drawn,
        )  # fmt: skip

    loss.at_targets = None
    if executor.positions is not None:
        executor.positions.detach()
        executor.positions = None
    with binding.plain():
        with nullcontext(lambda: None) if low_rank is None else low_rank.seeing_calls() as check_calls:
            costs = traced()
        check_calls()
        if not proves:
            return costs
        positions = ReadPositions.find(
            model, binding.partition, example, of, has_one_length=costs.fixed_tokens is not None
        )  # fmt: skip
        if positions is None:
            # That form reads the head's weight, where it would not see a pair.
            has_pair = low_rank is not None and any(binding.partition[c].kind == "lm_head" for c in low_rank.sites)
            return costs if has_pair else _at_targets(costs, model, loss, example, traced)
        with positions.skipping():
            costs = costs.with_skipping(traced(), last_layer=len(binding.partition.layers))
    executor.positions = positions
    return costs


def _at_targets(
    costs: CostModel, model: nn.Module, loss: TrainingLoss, example: Any, traced: Callable[[Loss], CostModel]
) -> CostModel:
    """Costs with the head at targets alone, where the loss has such a form that is proved on this model."""
    form = loss.form
    found = None if form is None else form.find(model, example)
    if form is None or found is None:
        return costs
    of_one = form.placed(form.of_one_position)
    narrowed = with_targets(costs, traced(lambda model, batch: of_one(model, batch).mean()))
    if narrowed is None:
        log.info("positions: the head is computed everywhere: its cost cannot be told from the decoder's")
        return costs
    loss.at_targets = found
    return narrowed


def machine_pace(model: nn.Module) -> float:
    """FLOPs per second to reckon with before the first step; products alone are about twice as fast."""
    weight = next(model.parameters())
    return 0.5 * measure_products(weight.device, weight.dtype)
