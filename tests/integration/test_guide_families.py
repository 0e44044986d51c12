"""The default preset on every family, at the granularities that make sense for it."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("adapter", [{"target_modules": ["query", "word_embeddings"]}, {"trainable_token_indices": {
    "word_embeddings": [1, 2]}, "target_modules": ["query"]}], ids=["lora", "trainable_tokens"])  # fmt: skip
def test_adapters_of_an_embedding_are_probed(adapter: dict[str, Any]) -> None:
    """Their own tables are looked up by the frozen table's settings."""
    from peft import LoraConfig, get_peft_model

    family = FAMILIES["bert"]
    torch.manual_seed(0)
    model: Any = get_peft_model(family.build(), LoraConfig(r=2, modules_to_save=["classifier"], **adapter))
    guide = Guide(model, Config(granularity="adapter", probe={"interval": 2, "size": 4}))
    optimizer = adamw(guide, lr=1e-2)
    for batch in guide.batches(Examples(family, count=60), batch_size=6, collate_fn=collate, epochs=1):
        guide.loss(batch).backward()
        guide.step(optimizer)
        optimizer.zero_grad()
    assert guide.ledger.probes >= 3
    assert any("word_embeddings" in name for name in guide.error_map.observed)
