"""A small LLaMA, and a workload made of it."""

from __future__ import annotations

import torch
from torch import nn

from rgft.bench.engine.workloads import EngineWorkload


def tiny_llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def example(seed: int, model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (8,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


TINY = EngineWorkload(
    name="tiny", build=lambda: tiny_llama(4), example=example, rows=4, few=True, neuron_blocks=2,
    lora_targets=("q_proj", "v_proj"),
)  # fmt: skip
