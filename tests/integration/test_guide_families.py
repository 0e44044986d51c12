"""The default preset on every family, at the granularities that make sense for it."""

from __future__ import annotations

import pytest
import torch

from rgft import Config, Guide
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, collate

GRANULARITIES = {
    "bert": ("layer", "block", "head"), "gpt2": ("layer", "head"), "llama": ("block", "head"),
    "t5": ("layer", "block", "head"),
    "resnet": ("layer", "block", "head"), "efficientnet": ("layer", "block", "head"),
    "mixtral": ("layer", "block", "head"), "peft_lora": ("layer", "adapter"), "peft_llama_lora": ("layer", "adapter"),
    "vit": ("layer", "block", "head"),
    "torch_transformer_encoder": ("layer", "head"), "conv_net": ("layer", "head"), "mlp": ("layer",),
}  # fmt: skip
CASES = [(name, granularity) for name, several in GRANULARITIES.items() for granularity in several]


@pytest.mark.parametrize(("name", "granularity"), CASES, ids=["-".join(case) for case in CASES])
def test_preset_rgft_trains(name: str, granularity: str) -> None:
    """Sixteen examples learnt by heart: the loss on them falls, with a decision after a tenth of the run."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    guide = Guide(family.build(), Config(granularity=granularity, probe={"interval": 8, "size": 2}))
    data = Examples(family, count=24)
    optimizer = adamw(guide, lr=1e-2 if "peft" in name else 3e-3, weight_decay=0.01)
    losses = []
    for batch in guide.batches(data, batch_size=6, collate_fn=collate, epochs=5):
        loss = guide.loss(batch)
        losses.append(float(loss.detach()))
        loss.backward()
        guide.step(optimizer)
        optimizer.zero_grad()
    assert len(losses) == 20
    assert sum(losses[-4:]) < sum(losses[:4]) * (0.995 if "peft" in name else 0.98)
    assert guide.ledger.probes >= 2
    assert guide.plans
    assert guide.plan.reason
    assert 0.0 < guide.flops_fraction <= 1.03
