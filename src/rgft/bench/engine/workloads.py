"""The models that the engine bench makes steps of, with batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineWorkload:
    """A model and the shape of its batches.

    Attributes:
        name: in results.
        build: makes the model, on the CPU.
        example: (seed, model) → one example of fixed shape, without the batch dimension.
        rows: examples per batch.
        dtype: of the weights.
        lora_targets: names of the linear modules that LoRA adapts (all of the layers'); none: LoRA is not timed.
        head: names of modules outside the layers that are trained in full beside LoRA.
        layers_pattern: name of the list of layers, for LoRA on the top ones.
        few: whether only the most telling cells are timed.
        neuron_blocks: per layer, at granularity "head".
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[int, nn.Module], dict[str, Tensor]]
    rows: int
    dtype: torch.dtype = torch.float32
    lora_targets: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    layers_pattern: str = "layers"
    few: bool = False
    neuron_blocks: int = 12


class Examples:
    """`count` examples of a workload; map-style."""

    def __init__(self, workload: EngineWorkload, model: nn.Module, count: int) -> None:
        self._rows = [workload.example(seed, model) for seed in range(count)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows[index]


def tokens(length: int, *, causal: bool) -> Callable[[int, nn.Module], dict[str, Tensor]]:
    """Makes examples of so many random tokens; labels are the tokens themselves, or one of two classes."""

    def example(seed: int, model: nn.Module) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        config: Any = model.config
        ids = torch.randint(5, config.vocab_size, (length,), generator=generator)
        labels = ids.clone() if causal else torch.randint(2, (), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return example


def _pixels(seed: int, model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(3, 224, 224, generator=generator),
        "labels": torch.randint(1000, (), generator=generator),
    }


def _minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    from rgft.tasks.demo import model_folder
    from rgft.tasks.quiet import quiet_transformers

    with quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)


def _smollm2_like() -> nn.Module:
    """SmolLM2-135M's shape; what a step costs does not depend on the weights' values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
        )
    )  # fmt: skip


def _llama_1b() -> nn.Module:
    """Llama 3.2 1B's shape, but for its vocabulary of 32,000 and untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=4096,
        )
    )  # fmt: skip


#: As many classes as ImageNet has.
_IMAGENET = {label: str(label) for label in range(1000)}


def _vit_b() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(id2label=_IMAGENET))


def _resnet_50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(id2label=_IMAGENET))


_BERT = ("query", "key", "value", "dense")
_VIT = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

WORKLOADS: Mapping[str, EngineWorkload] = {
    workload.name: workload
    for workload in (
        EngineWorkload(
            name="minilm", build=_minilm, example=tokens(32, causal=False), rows=32, lora_targets=_BERT,
            head=("classifier", "pooler"), layers_pattern="layer",
        ),
        EngineWorkload(
            name="smollm2", build=_smollm2_like, example=tokens(64, causal=True), rows=1, lora_targets=_LLAMA,
            few=True, neuron_blocks=3,
        ),
        EngineWorkload(
            name="llama_1b", build=_llama_1b, example=tokens(512, causal=True), rows=8, dtype=torch.bfloat16,
            lora_targets=_LLAMA, neuron_blocks=8,
        ),
        EngineWorkload(
            name="vit_b", build=_vit_b, example=_pixels, rows=64, lora_targets=_VIT, head=("classifier",),
        ),
        EngineWorkload(name="resnet_50", build=_resnet_50, example=_pixels, rows=64, few=True),
    )
}  # fmt: skip


def workload(name: str) -> EngineWorkload:
    """The workload of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload: expected one of {', '.join(WORKLOADS)} or overheads, found {name!r}")
    return WORKLOADS[name]
