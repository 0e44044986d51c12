"""Runs the engine bench: cell by cell beside full fine-tuning, each result written when it is done."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rgft.bench.engine.cells import EngineCell, all_cells, few_cells
from rgft.bench.engine.stepping import Stepper, stepper
from rgft.bench.engine.workloads import EngineWorkload
from rgft.cost.elements import count_elements
from rgft.cost.memory import step_memory
from rgft.cost.rates import Rates, measure_rates, product_shapes, seconds_of
from rgft.telemetry.atomic_write import write_bytes
from rgft.telemetry.environment import environment

log = logging.getLogger("rgft")

SCHEMA = "rgft.engine/1"
#: Timed steps of each cell, and of full fine-tuning between them.
STEPS = 7


def cells_of(workload: EngineWorkload) -> list[EngineCell]:
    """What is timed of a workload; without LoRA where it names nothing to adapt."""
    cells = few_cells() if workload.few else all_cells()
    return [cell for cell in cells if workload.lora_targets or cell.kind not in ("lora", "lora_top")]


def run_engine(
    workload: EngineWorkload, folder: Path, *, device: torch.device, stop_after_seconds: float | None = None
) -> Iterator[Path]:
    """Times what has no result yet; yields the path of each new result.

    Args:
        workload: model and batches.
        folder: of the result files.
        device: where the steps are made.
        stop_after_seconds: no new cell is begun after this time.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    pending = [cell for cell in cells_of(workload) if not (folder / f"{cell.name}.json").exists()]
    if not pending:
        return
    reference = stepper(EngineCell(kind="full"), workload, device)
    rates = measure_rates(device, workload.dtype, product_shapes(reference.model, reference.step))
    for _ in range(reference.warm_up):
        reference.step()
    for cell in pending:
        if stop_after_seconds is not None and time.perf_counter() - started > stop_after_seconds:
            return
        result = _measured(cell, workload, reference, device, rates)
        path = folder / f"{cell.name}.json"
        write_bytes(path, (json.dumps(result, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        yield path


def _measured(
    cell: EngineCell, workload: EngineWorkload, reference: Stepper, device: torch.device, rates: Rates
) -> dict[str, Any]:
    held = _allocated(device)
    timed = stepper(cell, workload, device)
    try:
        for _ in range(timed.warm_up):
            timed.step()
        memory = step_memory(timed.model, timed.optimizer, timed.step)
        flops = timed.step_flops()
        elements = count_elements(timed.step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            timed.step()
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
        own: list[float] = []
        full: list[float] = []
        # Step by step in turn, so that a machine's moods fall on both alike.
        for _ in range(STEPS):
            full.append(seconds_of(reference.step, device))
            own.append(seconds_of(timed.step, device))
        updated = sum(
            p.numel() for group in timed.optimizer.param_groups for p in group["params"] if p in timed.optimizer.state
        )
    finally:
        timed.close()
        del timed
        gc.collect()
    full_flops = reference.step_flops()
    predicted = rates.seconds(flops, updated=updated, elements=elements)
    log.info("%s: %.3f of full fine-tuning's time, %.3f of its FLOPs", cell.name, median(own) / median(full),
             flops / full_flops)  # fmt: skip
    return {
        "schema": SCHEMA, "workload": workload.name, "cell": cell.name, "kind": cell.kind,
        "frozen_fraction": cell.frozen_fraction, "dw": cell.dw, "granularity": cell.granularity, "cache": cell.cache,
        "low_rank": cell.low_rank,
        "rows": workload.rows, "dtype": str(workload.dtype).removeprefix("torch."), "device": str(device),
        "steps": STEPS, "step_seconds": own, "full_step_seconds": full,
        "time_of_full": median(own) / median(full), "flops": flops, "flops_of_full": flops / full_flops,
        "updated_parameters": updated, "written_elements": elements.written,
        "drawn_elements": elements.drawn, "fresh_elements": elements.fresh, "rates": rates.to_dict(),
        "predicted_seconds": predicted, "seconds_of_predicted": median(own) / predicted,
        "memory": memory.to_dict(), "peak_memory": peak, "environment": environment(),
    }  # fmt: skip


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
