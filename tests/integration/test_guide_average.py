"""`update.average_last`: a run leaves the mean of its last iterates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rgft import Config, Guide
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, assert_same_state, guided

BERT = FAMILIES["bert"]


def iterates_of(settings: dict[str, Any], **loop: Any) -> tuple[Guide, list[dict[str, torch.Tensor]], list[float]]:
    torch.manual_seed(3)
    guide = Guide(BERT.build(), Config(**settings))
    iterates: list[dict[str, torch.Tensor]] = []
    progress: list[float] = []

    def after_step(guide: Guide) -> None:
        iterates.append({name: p.detach().clone() for name, p in guide.model.named_parameters()})
        progress.append(guide.progress)

    optimizer = adamw(guide)
    guide.set_optimizer(optimizer)
    guided(guide, optimizer, Examples(BERT, 32), epochs=3, after_step=after_step, **loop)
    return guide, iterates, progress


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("budget", [0.5, None])
def test_weights_become_the_mean_of_the_last_iterates(granularity: str, budget: float | None) -> None:
    settings = {"granularity": granularity, "budget": budget, "update": {"average_last": 0.4}}
    guide, iterates, progress = iterates_of(settings)
    chosen = [weights for weights, done in zip(iterates, progress, strict=True) if done > 0.6]
    assert 3 <= len(chosen) < len(iterates)
    for name, parameter in guide.model.named_parameters():
        expected = torch.stack([weights[name] for weights in chosen]).double().mean(0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
    moved = [name for name, p in guide.model.named_parameters() if not torch.equal(p, iterates[-1][name])]
    assert moved


def test_frozen_components_keep_their_bits() -> None:
    settings = {"mask": {"name": "budget", "frozen_fraction": 0.5}, "update": {"average_last": 0.9}, "budget": 0.5}
    guide, _, _ = iterates_of({**settings, "warmup_fraction": 0.0})
    torch.manual_seed(3)
    initial = dict(BERT.build().named_parameters())
    off = {c.name for c in guide.partition} - set(guide.active)
    assert off
    guide.detach()
    same = {name for name, p in guide.model.named_parameters() if torch.equal(p, initial[name])}
    for component in guide.partition:
        names = {part.parameter for part in component.slices}
        if component.name in off:
            assert names <= same
        else:
            assert names - same


def test_without_it_the_last_step_stays() -> None:
    guide, iterates, _ = iterates_of({"update": {"average_last": 0.0}, "budget": 0.5})
    assert all(torch.equal(p, iterates[-1][name]) for name, p in guide.model.named_parameters())


def test_a_loop_that_is_left_early_keeps_the_last_step() -> None:
    guide, iterates, progress = iterates_of({"update": {"average_last": 0.9}, "budget": 0.5}, steps=5)
    assert progress[-1] > 0.1
    assert all(torch.equal(p, iterates[-1][name]) for name, p in guide.model.named_parameters())


def test_data_that_ends_inside_an_accumulation() -> None:
    """The step that is still to come is the last that counts."""
    settings = {"preset": "full", "update": {"average_last": 0.5}}
    guide = Guide(BERT.build(), Config(**settings))
    optimizer = adamw(guide)
    batches, iterates = 0, []
    for batch in guide.batches(Examples(BERT, 20), batch_size=4, epochs=1):
        guide.loss(batch).backward()
        batches += 1
        if batches % 2 == 0:
            guide.step(optimizer)
            optimizer.zero_grad()
            iterates.append({name: p.detach().clone() for name, p in guide.model.named_parameters()})
    assert batches % 2 == 1
    before = {name: p.detach().clone() for name, p in guide.model.named_parameters()}
    assert all(torch.equal(value, iterates[-1][name]) for name, value in before.items())
    step = optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        iterates.append({name: p.detach().clone() for name, p in guide.model.named_parameters()})

    optimizer.step = recorded  # type: ignore[method-assign]
    guide.step(optimizer)
    for name, parameter in guide.model.named_parameters():
        expected = torch.stack([weights[name] for weights in iterates[-2:]]).double().mean(0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_detach_after_averaging_leaves_the_mean_in_a_plain_model() -> None:
    guide, _, _ = iterates_of({"granularity": "head", "budget": 0.5, "update": {"average_last": 0.5}})
    with guide._binding.plain():
        mean = {name: p.detach().clone() for name, p in guide.model.state_dict().items()}
    guide.detach()
    plain = BERT.build()
    plain.load_state_dict(mean)
    assert_same_state(guide.model, plain)
