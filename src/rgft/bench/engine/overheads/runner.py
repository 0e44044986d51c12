"""Measures the overheads one after another, each result written when it is done."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rgft.bench.engine.overheads.figures import Measured
from rgft.bench.engine.overheads.full_preset import full_preset
from rgft.bench.engine.overheads.guide_time import guide_time
from rgft.bench.engine.overheads.memory import memory_above_cut
from rgft.bench.engine.overheads.shared_cache import shared_cache
from rgft.bench.engine.overheads.sizes import Sizes
from rgft.bench.engine.overheads.switching import plan_switch
from rgft.bench.results import read_results
from rgft.telemetry.atomic_write import write_bytes
from rgft.telemetry.environment import environment

log = logging.getLogger("rgft")

SCHEMA = "rgft.overheads/1"
#: Bytes that a step of the large model may hold with its lower half frozen.
LARGE_AT_MOST = 10_000_000_000


def measurements(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Measured]]:
    """What is measured, by the name of its result file."""
    large, deep = sizes.large, sizes.deep_encoder
    return {
        "guide_time": partial(guide_time, sizes, device),
        "full_preset": partial(full_preset, sizes, device),
        "shared_cache": partial(shared_cache, sizes, device),
        **{f"plan_switch-{unit}": partial(plan_switch, sizes, device, unit) for unit in ("layer", "head")},
        **{
            f"memory-{deep.name}-frozen{round(100 * frozen)}": partial(memory_above_cut, deep, device, frozen)
            for frozen in (0.25, 0.5, 0.75)
        },
        f"memory-{large.name}-frozen50": partial(memory_above_cut, large, device, 0.5, at_most=LARGE_AT_MOST),
    }


def run_overheads(
    sizes: Sizes, folder: Path, *, device: torch.device, stop_after_seconds: float | None = None
) -> Iterator[Path]:
    """Measures what has no result yet; yields the path of each new result.

    Args:
        sizes: of the models.
        folder: of the result files.
        device: where it is measured.
        stop_after_seconds: no new measurement is begun after this time.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for name, measure in measurements(sizes, device).items():
        path = folder / f"{name}.json"
        if path.exists():
            continue
        if stop_after_seconds is not None and time.perf_counter() - started > stop_after_seconds:
            return
        result = {
            "schema": SCHEMA, "overhead": name, "sizes": sizes.name, "device": str(device), "measured_on": device.type,
            **measure().to_dict(), "environment": environment(),
        }  # fmt: skip
        write_bytes(path, (json.dumps(result, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        log.info("%s: %s", name, _against_targets(result))
        gc.collect()
        yield path


def _against_targets(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{target['figure']} {_told(result['figures'][target['figure']])}, {'met' if target['is_met'] else 'missed'}"
        for target in result["targets"]
    )


def _told(value: float | bool) -> str:
    return str(value) if isinstance(value, bool) else f"{value:.4g}"


def table(folder: Path) -> str:
    """The results below a folder as a Markdown table of figures that have a target.

    Raises:
        DataError: there are none.
    """
    results = read_results(folder, SCHEMA, of="overhead bench")
    lines = ["| overhead | measured on | figure | value | target | met |", "|---|---|---|---|---|---|"]
    for result in results:
        for target in result["targets"]:
            bounds = [(sign, target[key]) for sign, key in (("≥", "at_least"), ("≤", "at_most"))]
            wanted = " and ".join(f"{sign} {_told(bound)}" for sign, bound in bounds if bound is not None)
            lines.append(
                f"| {result['overhead']} | {result['measured_on']} | {target['figure']} "
                f"| {_told(result['figures'][target['figure']])} | {wanted} | {'yes' if target['is_met'] else 'no'} |"
            )
    return "\n".join(lines)
