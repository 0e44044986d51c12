"""Counting what a pass would save, and the peak of what is held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rgft.cost.memory import forecast_memory
from rgft.cost.peak import PeakMemory
from rgft.cost.saved import saved_activations
from rgft.partition import partition
from tests.families import FAMILIES, loss_of


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_every_cut_saves_what_a_pass_with_that_cut_does(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build().eval(), family.batch(rows=4)
    parts = partition(model)
    saved = saved_activations(model, parts.layers, lambda: loss_of(model, batch))
    depths = sorted({component.depth for component in parts})
    assert len(depths) >= 4
    for cut in depths:
        trained = {part.parameter for c in parts if c.depth >= cut for part in c.slices}
        really = forecast_memory(model, trained, lambda: loss_of(model, batch)).activations
        above = saved.above(cut)
        # Never less; more by inputs of weights that are off (a tied table), and of the lowest layer that trains.
        assert really <= above <= 1.4 * really + 2 * saved.hidden
    assert saved.above(0) == forecast_memory(model, set(dict(model.named_parameters())), lambda: loss_of(model, batch)
                                             ).activations  # fmt: skip


def test_counting_keeps_nothing() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
    x = torch.randn(32, 64)
    layer = 32 * 64 * 4
    held = [*model.parameters(), x]
    with PeakMemory(held) as counting:
        saved = saved_activations(model, [str(i) for i in range(8)], lambda: model(x).sum())
    assert saved.above(0) == 9 * layer  # the input, and eight outputs of tanh
    assert saved.above(8) == 2 * layer
    assert saved.by_layer == (2 * layer, *[layer] * 7)
    assert (saved.largest, saved.hidden) == (layer, layer)
    kept = sum(tensor.nbytes for tensor in held)
    assert counting.peak - kept <= 4 * layer
    with PeakMemory(held) as training:
        loss = model(x).sum()
    assert training.peak - kept >= 8 * layer
    loss.backward()


def test_the_peak_by_hand() -> None:
    held = torch.zeros(100)
    with PeakMemory([held, held.view(10, 10)], beside=1000) as peak:
        assert peak.peak == 1400
        first = torch.zeros(50)
        second = first + 1.0
        del first
        torch.zeros(25)
        view = second.view(5, 10)
        assert view.shape == (5, 10)
    assert peak.peak == 1400 + 400  # the third came when the first had gone
    with PeakMemory([held]) as step:
        weight = nn.Parameter(held.view(10, 10))
        (weight * weight).sum().backward()
    assert 1200 <= step.peak <= 2000
