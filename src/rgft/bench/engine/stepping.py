"""Steps of a cell, one at a time: a plain loop for the baselines, the guide's for RGFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from rgft.batches import BatchStream
from rgft.bench.engine.cells import EngineCell, cut_at, plan_of
from rgft.bench.engine.workloads import EngineWorkload, Examples
from rgft.config import Config
from rgft.guide import Guide
from rgft.optimizer import adamw
from rgft.partition import partition
from rgft.telemetry.flop_counter import count_flops

#: Batches of the data set; with a cache, the first epoch fills it.
BATCHES = 2
LR = 1e-5


@dataclass(kw_only=True)
class Stepper:
    """A cell that is ready to be timed.

    Attributes:
        model: what is trained.
        optimizer: its optimizer, of one kernel for all cells.
        step: makes one whole optimizer step, gradients set to None at its end.
        step_flops: what a step costs in the state that is timed.
        warm_up: steps to be made first.
        close: gives the model back.
    """

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[], None]
    step_flops: Callable[[], float]
    warm_up: int
    close: Callable[[], None]


def stepper(cell: EngineCell, workload: EngineWorkload, device: torch.device) -> Stepper:
    """Builds model, optimizer and data of a cell."""
    torch.manual_seed(0)
    model = workload.build().to(workload.dtype)
    examples = Examples(workload, model, workload.rows * BATCHES)
    if cell.kind in ("lora", "lora_top"):
        model = _with_lora(model, cell, workload)
    model.to(device).train()
    if cell.kind == "rgft":
        return _guided(model, examples, cell, workload, device)
    return _plain(model, examples, cell, workload, device)


def _with_lora(model: nn.Module, cell: EngineCell, workload: EngineWorkload) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    components = partition(model).components
    layers = sum(1 for c in components if c.layer is not None)
    cut = cut_at(components, cell.frozen_fraction)
    top = list(range(max(0, cut - 1), layers)) if cut else None
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(workload.lora_targets),
        modules_to_save=list(workload.head) or None, layers_to_transform=top,
        layers_pattern=workload.layers_pattern if top else None,
    )  # fmt: skip
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss


def _plain(
    model: nn.Module, examples: Examples, cell: EngineCell, workload: EngineWorkload, device: torch.device
) -> Stepper:
    if cell.kind == "frozen":
        components = partition(model).components
        below = [c for c in components if c.depth < cut_at(components, cell.frozen_fraction)]
        frozen = {part.parameter for component in below for part in component.slices}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=LR)
    stream = BatchStream(examples, batch_size=workload.rows, collate_fn=default_collate, epochs=None, seed=0)
    batches = (moved(indexed.batch, device) for indexed in stream)

    def step() -> None:
        _loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(
        model=model, optimizer=optimizer, step=step, step_flops=lambda: count_flops(step), warm_up=2,
        close=lambda: None,
    )  # fmt: skip


def _guided(
    model: nn.Module, examples: Examples, cell: EngineCell, workload: EngineWorkload, device: torch.device
) -> Stepper:
    blocks = workload.neuron_blocks if cell.granularity == "head" else 1
    plan = plan_of(cell, partition(model, cell.granularity, ffn_blocks=blocks))
    is_plain = cell.frozen_fraction == 0.0 and cell.dw == 1.0
    config = Config(
        preset="full", granularity=cell.granularity, ffn_blocks=blocks,
        policy=None if is_plain else {"name": "static", "plan": plan.to_dict()},
        execution={"cache": "memory" if cell.cache else "none"},
        update={"low_rank": {"rank": cell.low_rank, "others": "frozen"}} if cell.low_rank else {},
    )  # fmt: skip
    guide = Guide(model, config, loss=lambda m, batch: _loss(m, moved(batch, device)))
    optimizer = adamw(guide.param_groups(lr=LR, weight_decay=0.01), lr=LR)
    # Prepared on one epoch: of an endless run only steps are looked at.
    guide.prepare(BatchStream(examples, batch_size=workload.rows, collate_fn=default_collate, epochs=1, seed=0))
    batches: Iterator[Any] = guide.batches(
        examples, batch_size=workload.rows, collate_fn=default_collate, epochs=1_000_000
    )

    def step() -> None:
        guide.loss(next(batches)).backward()
        guide.step(optimizer)
        optimizer.zero_grad()

    def step_flops() -> float:
        before = guide.ledger.spent_flops
        step()
        return guide.ledger.spent_flops - before

    return Stepper(
        model=model, optimizer=optimizer, step=step, step_flops=step_flops,
        warm_up=2 + BATCHES * cell.cache, close=guide.detach,
    )  # fmt: skip


def moved(batch: Any, device: torch.device) -> Any:
    """The batch's tensors on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
