"""The models whose overheads are measured. All have random weights: what is measured does not depend on values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rgft.bench.engine.workloads import EngineWorkload, tokens


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One set of models.

    Attributes:
        name: in results.
        large: plans are switched on it, and its memory is measured.
        many_components: its tensors are so small that what is computed with them takes next to no time.
        encoder: stepped with everything on, beside a plain loop.
        deep_encoder: its memory is measured at several cuts; of a number of layers that has quarters.
        switches: timed plan switches.
        steps: timed steps of each loop.
        sweeps: timed sweeps of trials that share a cache.
        sweep_batches: batches of a trial's epoch.
    """

    name: str
    large: EngineWorkload
    many_components: EngineWorkload
    encoder: EngineWorkload
    deep_encoder: EngineWorkload
    switches: int
    steps: int
    sweeps: int
    sweep_batches: int


def llama(
    *, hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, dtype: torch.dtype
) -> Callable[[], nn.Module]:
    """A LLaMA-type language model with grouped-query attention and an untied head, made in `dtype`."""

    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=1024,
            tie_word_embeddings=False,
        )  # fmt: skip
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # casting afterwards would take three times the memory
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)

    return build


def encoder(*, hidden: int, layers: int, vocabulary: int) -> Callable[[], nn.Module]:
    """A BERT-type classifier of MiniLM's proportions."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                num_attention_heads=12,
            )
        )  # fmt: skip

    return build


def made_on(device: torch.device, workload: EngineWorkload) -> EngineWorkload:
    """The workload whose model is made where it is used: an accelerator draws a billion weights in no time."""

    def build() -> nn.Module:
        with device:
            return workload.build()

    return replace(workload, build=build)


#: About 300 components at granularity "head": of each of 16 layers 8 groups of heads, 10 blocks of neurons and norms.
_MANY = EngineWorkload(
    name="many_components", rows=1, neuron_blocks=10, example=tokens(4, causal=True),
    build=llama(hidden=32, inner=40, layers=16, heads=8, groups=8, vocabulary=64, dtype=torch.float32),
)  # fmt: skip

USUAL = Sizes(
    name="usual",
    large=EngineWorkload(
        name="llama_1b", rows=1, dtype=torch.bfloat16, neuron_blocks=8, example=tokens(128, causal=True),
        build=llama(
            hidden=2048, inner=8192, layers=16, heads=32, groups=8, vocabulary=32000, dtype=torch.bfloat16
        ),
    ),
    many_components=_MANY,
    encoder=EngineWorkload(
        name="minilm_l6", rows=32, example=tokens(32, causal=False),
        build=encoder(hidden=384, layers=6, vocabulary=30522),
    ),
    deep_encoder=EngineWorkload(
        name="minilm_l12", rows=32, example=tokens(32, causal=False),
        build=encoder(hidden=384, layers=12, vocabulary=30522),
    ),
    switches=20,
    steps=40,
    sweeps=2,
    sweep_batches=16,
)  # fmt: skip

SMALL = Sizes(
    name="small",
    large=EngineWorkload(
        name="llama_small", rows=1, dtype=torch.bfloat16, neuron_blocks=2, example=tokens(8, causal=True),
        build=llama(hidden=32, inner=64, layers=4, heads=4, groups=2, vocabulary=64, dtype=torch.bfloat16),
    ),
    many_components=EngineWorkload(
        name="few_components", rows=1, neuron_blocks=2, example=tokens(4, causal=True),
        build=llama(hidden=32, inner=40, layers=2, heads=4, groups=4, vocabulary=64, dtype=torch.float32),
    ),
    encoder=EngineWorkload(
        name="encoder_small", rows=2, example=tokens(8, causal=False),
        build=encoder(hidden=24, layers=2, vocabulary=64),
    ),
    deep_encoder=EngineWorkload(
        name="deep_encoder_small", rows=2, example=tokens(8, causal=False),
        build=encoder(hidden=24, layers=4, vocabulary=64),
    ),
    switches=4,
    steps=4,
    sweeps=1,
    sweep_batches=2,
)  # fmt: skip

SIZES: Mapping[str, Sizes] = {sizes.name: sizes for sizes in (USUAL, SMALL)}
