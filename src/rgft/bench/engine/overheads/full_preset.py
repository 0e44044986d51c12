"""A step with everything on through the guide, beside the plain loop's."""

from __future__ import annotations

from statistics import median

import torch

from rgft.bench.engine.cells import EngineCell
from rgft.bench.engine.overheads.figures import Measured, Target
from rgft.bench.engine.overheads.sizes import Sizes
from rgft.bench.engine.stepping import stepper
from rgft.cost.rates import seconds_of


def full_preset(sizes: Sizes, device: torch.device) -> Measured:
    """Steps of the preset `full` and of a plain loop in turn, with one optimizer kernel.

    Figures: `time_of_plain`, the ratio of the medians; `median_of_ratios`, of each step and the plain one beside it.
    """
    workload = sizes.encoder
    plain = stepper(EngineCell(kind="full"), workload, device)
    guided = stepper(EngineCell(kind="rgft"), workload, device)
    try:
        warm_up = max(plain.warm_up, guided.warm_up)
        for _ in range(warm_up):
            plain.step()
            guided.step()
        pairs = [(seconds_of(guided.step, device), seconds_of(plain.step, device)) for _ in range(sizes.steps)]
    finally:
        guided.close()
    own, beside = ([pair[index] for pair in pairs] for index in range(2))
    return Measured(
        config={"model": workload.name, "rows": workload.rows, "granularity": "layer", "optimizer": "AdamW, fused"},
        figures={
            "time_of_plain": median(own) / median(beside), "median_of_ratios": median(a / b for a, b in pairs),
            "step_seconds": own, "plain_step_seconds": beside,
        },
        targets=(Target(figure="time_of_plain", at_most=1.03),), warm_up=warm_up, repeats=sizes.steps,
    )  # fmt: skip
