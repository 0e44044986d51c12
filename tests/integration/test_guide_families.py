"""The default preset on every family, at the granularities that make sense for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.telemetry.flop_counter import count_flops
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


class OfTwelveTokens(nn.Module):
    """Positions are a parameter, so no other length goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 16), nn.Parameter(torch.zeros(12, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
        self.classifier = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BTD = self.embed(input_ids) + self.positions
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, src_key_padding_mask=attention_mask == 0)
        return self.classifier(hidden_BTD[:, 0])


def test_a_model_that_takes_one_length_alone() -> None:
    """Though its batches are padded and could be narrower."""
    torch.manual_seed(0)
    labels = torch.arange(96) % 3
    ids = torch.randint(3, 50, (96, 12))
    ids[:, 1] = labels
    mask = (torch.arange(12) < torch.randint(2, 13, (96, 1))).long()
    rows = [dict(zip(("ids", "mask", "labels"), row, strict=True)) for row in zip(ids, mask, labels, strict=True)]

    def losses_B(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"], batch["mask"]), batch["labels"], reduction="none")

    guide = Guide(OfTwelveTokens(), Config(budget=0.3), loss=losses_B)
    optimizer = adamw(guide, lr=1e-2)
    losses, counted = [], 0.0

    def step(batch: Any) -> None:
        loss = guide.loss(batch)
        losses.append(float(loss.detach()))
        loss.backward()
        guide.step(optimizer)
        optimizer.zero_grad()

    for batch in guide.batches(rows, batch_size=16, epochs=8):
        before = guide.ledger.spent_flops
        counted += count_flops(lambda batch=batch: step(batch))
        assert guide.ledger.spent_flops > before
    assert guide.costs is not None
    assert guide.costs.fixed_tokens == 12
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert 0.9 * 0.3 < guide.flops_fraction <= 0.3
    assert guide.ledger.forward_flops + guide.ledger.dx_flops + guide.ledger.dw_flops == pytest.approx(
        counted, rel=0.02
    )


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
