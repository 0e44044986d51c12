"""Seconds of a plan's switch: the cut moves up and down while optimizer moments of everything exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import default_collate

from rgft.batches import BatchStream
from rgft.bench.engine.cells import EngineCell, cut_at, plan_of
from rgft.bench.engine.overheads.figures import Measured, Target
from rgft.bench.engine.overheads.sizes import Sizes, made_on
from rgft.bench.engine.stepping import moved
from rgft.bench.engine.workloads import EngineWorkload, Examples
from rgft.components import Partition
from rgft.config import Config
from rgft.cost.rates import seconds_of
from rgft.execution.executor import Executor
from rgft.execution.views import bind
from rgft.guide import Guide
from rgft.partition import partition
from rgft.plan import Budget, UpdatePlan

WARM_UP = 2
#: Of the layers below the cut, in turn.
FRACTIONS = (0.5, 0.25)
LR = 1e-5
#: Elements of the pattern that moments are filled with.
_PATTERN = 1 << 20

Granularity = Literal["layer", "head"]


class KnownMoments:
    """AdamW's state, filled with a pattern, so that whether a bit of it changed is seen without a copy of it.

    Args:
        optimizer: without state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        noise = torch.rand(_PATTERN, generator=torch.Generator().manual_seed(0))
        self._patterns = {
            p.dtype: noise.to(p.device, p.dtype) for p in {p.dtype: p for p in self._parameters}.values()
        }  # fmt: skip
        for parameter in self._parameters:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(1.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
                for chunk in state[key].view(-1).split(_PATTERN):
                    chunk.copy_(self._patterns[parameter.dtype][: chunk.numel()])

    def are_intact(self) -> bool:
        """Whether every moment is there, bit for bit as it was."""
        return all(
            state is not None and state["step"].item() == 1.0
            and all(self._is_intact(state[key], parameter.dtype) for key in ("exp_avg", "exp_avg_sq"))
            for parameter in self._parameters
            for state in (self._optimizer.state.get(parameter),)
        )  # fmt: skip

    def _is_intact(self, moment: Tensor, dtype: torch.dtype) -> bool:
        pattern = self._patterns[dtype].view(torch.uint8)
        size = pattern.numel()
        return all(
            torch.equal(chunk, pattern[: chunk.numel()]) for chunk in moment.view(-1).view(torch.uint8).split(size)
        )


def plan_switch(sizes: Sizes, device: torch.device, granularity: Granularity) -> Measured:
    """A switch by the executor alone, and all of what the guide does for one; moments compared bit for bit.

    Figures: `apply_seconds` of `Executor.apply`; `guide_seconds` of pricing a step of a plan that was not seen before,
    and of putting it in force; `parameters`, of the model; `components`; `tensors`, which the optimizer holds;
    `moments_are_intact`.
    """
    workload = made_on(device, sizes.large)
    torch.manual_seed(0)
    model = workload.build().train()
    blocks = workload.neuron_blocks if granularity == "head" else 1
    parts = partition(model, granularity, ffn_blocks=blocks)
    applied, applied_intact, tensors = _by_executor(model, parts, sizes.switches, device)
    guided, guided_intact = _by_guide(model, workload, granularity, sizes.switches, device)
    return Measured(
        config={"model": workload.name, "dtype": str(workload.dtype).removeprefix("torch."), "granularity": granularity,
                "neuron_blocks": blocks, "frozen_fractions": list(FRACTIONS), "moments": "keep"},
        figures={
            "apply_seconds": median(applied), "apply_seconds_each": applied,
            "guide_seconds": median(guided), "guide_seconds_each": guided,
            "parameters": parts.numel, "components": len(parts), "tensors": tensors,
            "moments_are_intact": applied_intact and guided_intact,
        },
        targets=(
            Target(figure="apply_seconds", at_most=0.05), Target(figure="guide_seconds", at_most=0.05),
            Target(figure="moments_are_intact", at_least=True),
        ),
        warm_up=WARM_UP, repeats=sizes.switches,
    )  # fmt: skip


def _by_executor(
    model: nn.Module, parts: Partition, switches: int, device: torch.device
) -> tuple[list[float], bool, int]:
    binding = bind(model, parts)
    executor = Executor(model, binding, moments="keep")
    optimizer = AdamW([p for _, parameters in binding for p in parameters], lr=LR, foreach=True)
    moments = KnownMoments(optimizer)
    executor.set_optimizer(optimizer)
    steps = count()

    def switch(plan: UpdatePlan) -> None:
        executor.apply(plan, next(steps))

    seconds = _timed(switch, _plans(parts, WARM_UP + switches), device)
    is_intact = moments.are_intact()
    executor.detach()
    return seconds, is_intact, len(optimizer.param_groups[0]["params"])


def _by_guide(
    model: nn.Module, workload: EngineWorkload, granularity: Granularity, switches: int, device: torch.device
) -> tuple[list[float], bool]:
    blocks = workload.neuron_blocks if granularity == "head" else 1
    config = Config(preset="full", granularity=granularity, ffn_blocks=blocks, budget=Budget(flops=1.0))
    guide = Guide(model, config, loss=lambda m, batch: m(**moved(batch, device)).loss)
    moments = KnownMoments(optimizer := AdamW(guide.param_groups(lr=LR), lr=LR, foreach=True))
    guide.set_optimizer(optimizer)
    examples = Examples(workload, model, workload.rows)
    stream = BatchStream(examples, batch_size=workload.rows, collate_fn=default_collate, epochs=1, seed=0)
    guide.prepare(stream)
    guide.announce(stream.load(next(stream.indices())))

    def switch(plan: UpdatePlan) -> None:
        guide._decisions.plan = plan  # no policy decides anything here
        assert guide.affords_upcoming
        guide.begin_step()

    seconds = _timed(switch, _plans(guide.partition, WARM_UP + switches), device)
    is_intact = moments.are_intact()
    guide.detach()
    return seconds, is_intact


def _plans(parts: Partition, number: int) -> list[UpdatePlan]:
    """Cuts at a half and at a quarter in turn, each with other components off, so that none was seen before."""
    cuts = [cut_at(parts.components, fraction) for fraction in FRACTIONS]
    names = [c.name for c in parts.above(max(cuts) + 1)]
    plans: list[UpdatePlan] = []
    for index in range(number):
        plan = plan_of(EngineCell(kind="rgft", frozen_fraction=FRACTIONS[index % 2]), parts)
        # The binary digits of a number say what is off beside what lies below the cut.
        off = {name: 0.0 for digit, name in enumerate(names) if index // 2 >> digit & 1}
        plans.append(replace(plan, step=index, multipliers={**plan.multipliers, **off}))
    return plans


def _timed(switch: Callable[[UpdatePlan], None], plans: Sequence[UpdatePlan], device: torch.device) -> list[float]:
    return [seconds_of(lambda plan=plan: switch(plan), device) for plan in plans][WARM_UP:]
