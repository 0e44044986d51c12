"""Schedulers see the rates the user gave, whatever the plan multiplies them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from rgft import Config, Guide
from tests.families import FAMILIES
from tests.integration.loops import Examples, collate
from tests.integration.policies import Scripted, steer

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1.0 / (1.0 + step)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=5),
    "exponential": lambda o: ExponentialLR(o, gamma=0.8),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum=False),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_an_unguided_optimizer_and_steps_are_multiplied(name: str) -> None:
    """With plain SGD a component moves by −η(t)·f_k·g exactly."""
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(preset="full", granularity="block"))
    names = guide.partition.names
    factors = {component: (0.25, 1.0, 3.0)[index % 3] for index, component in enumerate(names)}
    steer(guide, Scripted(lambda situation: names, multipliers=factors))
    optimizer = SGD(guide.param_groups(lr=0.1), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    shadow = SGD([nn.Parameter(torch.zeros(1)) for _ in optimizer.param_groups], lr=0.1)
    expected = SCHEDULERS[name](shadow)
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    rates = []
    for batch in guide.batches(Examples(family), batch_size=4, collate_fn=collate):
        rate = shadow.param_groups[0]["lr"]
        rates.append(rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * len(optimizer.param_groups)
        loss = guide.loss(batch)
        loss.backward()
        before = {n: [(p.detach().clone(), p.grad) for p in guide._binding.parameters[n]] for n in names}
        guide.step(optimizer, None if plateau else scheduler)
        for component, parts in before.items():
            for (old, gradient), new in zip(parts, guide._binding.parameters[component], strict=True):
                assert gradient is not None
                moved = old - rate * factors[component] * gradient
                assert torch.allclose(new, moved, rtol=1e-6, atol=1e-7), component
        optimizer.zero_grad()
        shadow.step()
        for each in (scheduler, expected) if plateau else (expected,):
            each.step(1.0) if plateau else each.step()
    assert len(rates) == 6
    assert len(set(rates)) > 2


def test_the_guides_own_schedule_ends_with_the_budget() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), Config(budget=0.5, classifier_lr_multiplier=10.0))
    optimizer = torch.optim.AdamW(guide.param_groups(lr=1e-3), lr=1e-3)
    scheduler = guide.scheduler(optimizer, warmup=0.2)
    rates, shares = [], []
    for batch in guide.batches(Examples(family, count=80), batch_size=4, collate_fn=collate, epochs=2):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        shares.append(guide.progress)
        guide.loss(batch).backward()
        guide.step(optimizer, scheduler)
        optimizer.zero_grad()
    assert rates[0] == pytest.approx(1e-4)  # a hundredth of the classifier's: the first step is not wasted
    assert max(rates) == pytest.approx(1e-2, rel=0.15)
    assert rates[-1] < 0.1 * max(rates)
    peak = rates.index(max(rates))
    assert shares[peak] == pytest.approx(0.2, abs=0.1)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
