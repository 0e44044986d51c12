"""Memory of a step above a cut, in parts, beside what theory says of it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from rgft.bench.engine.cells import EngineCell, cut_at
from rgft.bench.engine.overheads.figures import Measured, Target
from rgft.bench.engine.overheads.sizes import made_on
from rgft.bench.engine.stepping import Stepper, moved, stepper
from rgft.bench.engine.workloads import EngineWorkload, Examples
from rgft.cost.memory import StepMemory, step_memory
from rgft.cost.peak import PeakMemory
from rgft.cost.saved import SavedActivations, saved_activations
from rgft.partition import partition

#: AdamW's two.
MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What theory needs to know of a model and a cut.

    Attributes:
        parameters, buffers_bytes: of the model.
        trained: parameters above the cut.
        item_bytes: of a weight.
        layers, active_layers: all, and those above the cut.
        layer_activations: bytes that full fine-tuning saves in the layers, for the batch in question.
        other_activations: bytes that it saves outside of them.
    """

    parameters: int
    buffers_bytes: int
    trained: int
    item_bytes: int
    layers: int
    active_layers: int
    layer_activations: int
    other_activations: int


def theory(shape: Shape) -> StepMemory:
    """Bytes by counting: parameters × bytes, gradients and moments above the cut, activations by active layers."""
    gradients = shape.trained * shape.item_bytes
    return StepMemory(
        weights=shape.parameters * shape.item_bytes + shape.buffers_bytes, gradients=gradients,
        moments=MOMENTS * gradients,
        activations=shape.other_activations + shape.layer_activations * shape.active_layers // shape.layers,
    )  # fmt: skip


def memory_above_cut(
    workload: EngineWorkload, device: torch.device, frozen_fraction: float, *, at_most: int | None = None
) -> Measured:
    """A full-rank step with the lowest layers frozen: `step_memory` in parts, theory, and their ratios.

    Figures: `measured` and `theory` in bytes, by part and as `total`, their sum; `ratios` of them; `total_bytes` and
    `total_of_theory`; `trained_of_theory`, of gradients, moments and activations together; `peak_bytes`, the most that
    tensors hold at once in a second step, with the optimizer's temporaries and without what is freed before them;
    `fp32_moments_add_bytes`, what moments of four bytes would hold beside those of the weights' type.
    """
    workload = made_on(device, workload)
    shape = shape_of(workload, device, frozen_fraction)
    timed = stepper(EngineCell(kind="rgft", frozen_fraction=frozen_fraction), workload, device)
    try:
        measured = step_memory(timed.model, timed.optimizer, timed.step).to_dict()
        peak = _peak(timed)
    finally:
        timed.close()
        del timed
        gc.collect()
    expected = theory(shape).to_dict()
    ratios = {part: measured[part] / expected[part] for part in expected}
    trained = [sum(memory[part] for part in ("gradients", "moments", "activations")) for memory in (measured, expected)]
    return Measured(
        config={"model": workload.name, "rows": workload.rows, "dtype": str(workload.dtype).removeprefix("torch."),
                "frozen_fraction": frozen_fraction, "layers": shape.layers, "active_layers": shape.active_layers,
                "parameters": shape.parameters, "trained_parameters": shape.trained, "optimizer": "AdamW, fused"},
        figures={
            "measured": measured, "theory": expected, "ratios": ratios, "total_bytes": measured["total"],
            "total_of_theory": ratios["total"], "trained_of_theory": trained[0] / trained[1], "peak_bytes": peak,
            "fp32_moments_add_bytes": MOMENTS * shape.trained * max(0, 4 - shape.item_bytes),
        },
        targets=(
            *((Target(figure="total_bytes", at_most=at_most),) if at_most else ()),
            Target(figure="total_of_theory", at_least=0.85, at_most=1.15),
            Target(figure="trained_of_theory", at_least=0.85, at_most=1.15),
        ),
        warm_up=0, repeats=1,
    )  # fmt: skip


def shape_of(workload: EngineWorkload, device: torch.device, frozen_fraction: float) -> Shape:
    """Counts the model's parameters, and what a forward pass of full fine-tuning saves of a batch."""
    torch.manual_seed(0)
    model = workload.build().to(workload.dtype).to(device).train()
    parts = partition(model)
    cut = cut_at(parts.components, frozen_fraction)
    saved = _saved(model, workload, parts.layers, device)
    in_layers = sum(saved.by_layer)
    return Shape(
        parameters=parts.numel, buffers_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        trained=sum(c.numel for c in parts.above(cut)), item_bytes=workload.dtype.itemsize,
        layers=len(parts.layers), active_layers=len(parts.layers) - max(0, cut - 1),
        layer_activations=in_layers, other_activations=saved.above(0) - in_layers,
    )  # fmt: skip


def _saved(
    model: nn.Module, workload: EngineWorkload, layers: tuple[str, ...], device: torch.device
) -> SavedActivations:
    examples = Examples(workload, model, workload.rows)
    batch = moved(default_collate([examples[row] for row in range(workload.rows)]), device)

    def loss() -> Tensor:
        return model(**batch).loss

    return saved_activations(model, layers, loss)


def _peak(timed: Stepper) -> int:
    state = [v for values in timed.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    with PeakMemory([*timed.model.parameters(), *timed.model.buffers(), *state]) as followed:
        timed.step()
    return followed.peak
