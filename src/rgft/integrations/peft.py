"""PEFT models: what a budget is a share of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rgft.batches import BatchStream
from rgft.cost import trace_costs
from rgft.errors import RGFTError
from rgft.partition import partition
from rgft.workload import Workload


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def base_flops(
    model: nn.Module, stream: BatchStream, losses: Sequence[Callable[[nn.Module, Any], Tensor]]
) -> float:  # fmt: skip
    """FLOPs of fully fine-tuning the base model of a PEFT model on the batches of a run, adapters left out.

    Args:
        model: PEFT's, not attached yet; as it was afterwards.
        stream: the batches.
        losses: what to trace; the next one where one cannot be read (fused kernels).

    Raises:
        RGFTError: the costs cannot be read (quantised weights); give `full_flops` then.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    example = stream.load(next(stream.indices()))
    try:
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            components = partition(model, "layer")
            for position, loss in enumerate(losses):
                try:
                    return Workload.scan(stream).full_flops(trace_costs(model, components, example, loss=loss))
                except RGFTError:
                    if position == len(losses) - 1:
                        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    raise ValueError("expected at least one loss")
