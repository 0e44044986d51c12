"""Every method of the bench trains a model within its budget, and only what it says."""

from __future__ import annotations

import copy

import pytest
import torch

from rgft import Guide
from rgft.batches import BatchStream
from rgft.bench.methods import METHODS
from rgft.components import Granularity
from rgft.cost import trace_costs
from rgft.partition import partition
from rgft.workload import Workload
from tests.families import FAMILIES, loss_of
from tests.integration.loops import Examples, adamw, guided, trimmed

BUDGET = 0.5
#: The family has two layers.
SMALLER = {"last_n": {"layers": 1}, "lisa": {"layers": 1}}


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_within_its_budget(name: str) -> None:
    family, method = FAMILIES["bert"], METHODS[name]
    data, plain = Examples(family, count=120), family.build()
    stream = BatchStream(data, batch_size=4, collate_fn=trimmed, epochs=1)
    example = stream.load(next(stream.indices()))
    full = Workload.scan(stream).full_flops(trace_costs(plain, partition(plain), example, loss=loss_of))
    model = method.prepare(plain, {"layers": 1} if name == "lora_top" else {})
    before = copy.deepcopy(dict(model.named_parameters()))
    settings = {"policy": {"name": name, **SMALLER[name]}} if name in SMALLER else {}
    guide = Guide(model, method.configuration(budget=BUDGET, seed=0, settings={"config": settings}), loss=loss_of)
    ever: set[str] = set()
    guide.prepare(stream, full_flops=full if method.changes_model else None)
    batches, _ = guided(guide, adamw(guide), data, collate_fn=trimmed, after_step=lambda g: ever.update(g.active))
    assert len(batches) > 5
    assert 0.3 * BUDGET < guide.flops_fraction <= BUDGET
    guide.detach()
    granularity: Granularity = guide.config.granularity  # type: ignore[assignment]
    names = {part.parameter for c in partition(model, granularity) if c.name in ever for part in c.slices}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= names
    if name == "lora_top":
        assert guide.plan.cut == 2
        assert not any(".layer.0." in n and "lora" in n for n in before)
