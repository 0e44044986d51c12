"""Runs of tiny models under a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from rgft import Config
from rgft.errors import BudgetError
from rgft.plan import MemoryPlan
from rgft.run import Run, Settings
from rgft.tasks.token_loss import number_of_targets, token_losses
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, collate, without_dropout

ROWS = 8


class FamilyTask:
    """Examples of a family, as a task."""

    metric: Callable[[], Any] = dict
    loss_at_targets = None

    def __init__(self, name: str, *, count: int = 40, tokens: int = 16) -> None:
        family = FAMILIES[name]
        self.is_lm = family.kind == "lm"
        self.model = family.build()
        self.train, self.validation, self.collate = Examples(family, count, tokens), None, collate

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return token_losses(model, batch) if self.is_lm else loss_of(model, batch)

    def weight(self, batch: Mapping[str, Any]) -> int:
        return number_of_targets(batch) if self.is_lm else len(batch["labels"])


def limited(name: str, memory: int | str, *, epochs: float = 3, settings: Mapping[str, Any] | None = None,
            task: FamilyTask | None = None, **config: Any) -> Run:  # fmt: skip
    """A run with that memory, not prepared yet."""
    budget = {"memory": memory, **config.pop("budget", {})}
    return Run(
        task or FamilyTask(name), Config(budget=budget, seed=3, **config),
        Settings(lr=1e-3, epochs=epochs, **{"batch_size": ROWS, **(settings or {})}),
    )  # fmt: skip


def planned(name: str, memory: int | str, *, has_dropout: bool = True, **config: Any) -> MemoryPlan:
    """What is chosen under that limit."""
    task = FamilyTask(name)
    if not has_dropout:
        without_dropout(task.model)
    run = limited(name, memory, task=task, **config)
    try:
        plan = run.prepare().memory
        assert plan is not None
        return plan
    finally:
        run.close()


def staircase(name: str, **config: Any) -> tuple[MemoryPlan, ...]:
    """Every plan that some limit leads to, from none at all to the smallest that holds the run."""
    key = repr((name, sorted(config.items())))
    if key not in _STAIRCASES:
        found = [planned(name, "1TB", **config)]
        with suppress(BudgetError):
            while True:
                found.append(planned(name, found[-1].needed - 1, **config))
        _STAIRCASES[key] = tuple(found)
    return _STAIRCASES[key]


_STAIRCASES: dict[str, tuple[MemoryPlan, ...]] = {}


def accumulated(run: Run, batch: Any) -> dict[str, Tensor]:
    """The gradients of one optimizer step on the batch, as the run's passes make them."""
    run.guide.announce(batch, None)
    run._passes(batch)
    found = {n: p.grad.clone() for n, p in run.task.model.named_parameters() if p.grad is not None}
    run.optimizer.zero_grad()
    return found


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖g − g_ref‖ / ‖g_ref‖ over all parameters."""
    assert found.keys() == expected.keys()
    apart = torch.stack([(found[n] - expected[n]).norm() for n in expected]).norm()
    return float(apart / torch.stack([g.norm() for g in expected.values()]).norm())
