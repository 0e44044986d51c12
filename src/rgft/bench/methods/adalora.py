"""AdaLoRA through PEFT: pairs in the form of a singular value decomposition, whose rank moves to where it matters.

Beside the steps, PEFT wants three things of a loop: the number of steps before the first, a call after each step while
gradients are there, and a term in the loss that keeps the factors orthogonal. It adds that term to a loss that the
model computes itself; ours does not, so it is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rgft.bench.methods.adapters import RANKS
from rgft.bench.methods.base import HEAD_AT_OWN_RATE, Method, steps_of
from rgft.bench.methods.peft_kinds import of_model
from rgft.execution.agreement import Loss
from rgft.run import Run

#: Shares of the run before ranks are taken away, and after the last of them was.
BEFORE, AFTER = 0.1, 0.3
#: Times that ranks are allocated anew.
ALLOCATIONS = 50
#: More than any run has: the number of steps is known only when the run is prepared.
_UNKNOWN = 1 << 30


def _change(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    from peft import AdaLoraConfig, get_peft_model

    rank, alpha = settings["rank"], settings["alpha"]
    config = AdaLoraConfig(
        **of_model(model), target_r=rank, init_r=rank * 3 // 2, lora_dropout=0.0,
        lora_alpha=2 * rank if alpha is None else alpha, total_step=_UNKNOWN,
    )  # fmt: skip
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _begin(run: Run) -> None:
    model: Any = run.task.model
    guide, config, allocator = run.guide, model.peft_config["default"], model.base_model
    steps = max(3, steps_of(run))
    config.total_step, config.tinit, config.tfinal = steps, int(BEFORE * steps), max(1, int(AFTER * steps))
    config.deltaT = max(1, steps // ALLOCATIONS)

    def allocate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        allocator.update_and_allocate(guide.step_count + 1)

    run.optimizer.register_step_post_hook(allocate)


def _with_orthogonality(loss: Loss, settings: Mapping[str, Any]) -> Loss:
    def both(model: nn.Module, batch: Any) -> Tensor:
        plain = loss(model, batch)
        return plain + _distance(model) if model.training else plain

    return both


def _distance(model: Any) -> Tensor:
    """‖P Pᵀ − I‖ of all factors P in the mean, times PEFT's weight."""
    factors = [p if "lora_A" in n else p.T for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    distances = [torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p), device=p.device)) for p in factors]
    return model.peft_config["default"].orth_reg_weight * torch.stack(distances).mean()


METHOD = Method(
    name="adalora", title="AdaLoRA", source="Zhang et al. 2023 (arXiv:2303.10512)", change=_change,
    cost="dW of the body's own weights; dX runs through it all, and adapters add their own work",
    settings={"rank": 8, "alpha": None}, config={"preset": "full", "granularity": "adapter"}, loss=_with_orthogonality,
    variants=RANKS, begin=_begin, instead=HEAD_AT_OWN_RATE, revision=2,
)  # fmt: skip
