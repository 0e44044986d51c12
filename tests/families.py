"""A zoo of tiny random models, one per architecture family, that tests everywhere run over.

Each has 2-3 layers, width 32 and a vocabulary of 60, and a batch with which `model(**batch).loss` works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 60
WIDTH = 32
CLASSES = 3


class Output(NamedTuple):
    """What the plain torch models return."""

    loss: Tensor | None
    logits: Tensor


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: key in `FAMILIES`.
        make: builds the model from torch's current RNG.
        kind: what the batch holds: "text" (classification), "lm", "seq2seq", "image" or "features".
    """

    name: str
    make: Callable[[], nn.Module]
    kind: str

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model in training mode; the global RNG is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().train()

    def batch(self, rows: int = 4, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward, labels included; odd rows of texts are padded on the right."""
        generator = torch.Generator().manual_seed(seed)

        def integers(high: int, *shape: int, low: int = 0) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        if self.kind == "image":
            return {
                "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator),
                "labels": integers(CLASSES, rows),
            }
        if self.kind == "features":
            return {"features": torch.randn(rows, WIDTH, generator=generator), "labels": integers(CLASSES, rows)}
        input_ids = integers(VOCABULARY, rows, tokens, low=3)
        attention_mask = torch.ones(rows, tokens, dtype=torch.long)
        for row in range(1, rows, 2):
            attention_mask[row, max(1, tokens - 1 - row) :] = 0
        batch = {"input_ids": input_ids.masked_fill(attention_mask == 0, 1), "attention_mask": attention_mask}
        if self.kind == "text":
            return {**batch, "labels": integers(CLASSES, rows)}
        if self.kind == "lm":
            return {**batch, "labels": input_ids.masked_fill(attention_mask == 0, -100)}
        labels = integers(VOCABULARY, rows, max(2, tokens // 2), low=3)
        labels[1::2, -1] = -100
        return {**batch, "labels": labels}


FAMILIES: dict[str, Family] = {}


def _family(name: str, kind: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FAMILIES[name] = Family(name, make, kind)
        return make

    return register


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": CLASSES, **changes,
    }  # fmt: skip


def _decoder_sizes(**changes: Any) -> dict[str, Any]:
    sizes = _sizes(num_key_value_heads=2, pad_token_id=1, bos_token_id=0, eos_token_id=2, **changes)
    del sizes["num_labels"]
    return sizes


@_family("bert", "text")
def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_sizes()))


@_family("roberta", "text")
def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(**_sizes()))


@_family("distilbert", "text")
def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
        pad_token_id=1, num_labels=CLASSES,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


@_family("mpnet", "text")
def mpnet() -> nn.Module:
    from transformers import MPNetConfig, MPNetForSequenceClassification

    return MPNetForSequenceClassification(MPNetConfig(**_sizes()))


@_family("gpt2", "lm")
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=4, n_inner=64, n_positions=64, bos_token_id=0,
        eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@_family("gpt_neox", "lm")
def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = _decoder_sizes(bias=True)
    del sizes["num_key_value_heads"]
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


@_family("llama", "lm")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder_sizes(num_hidden_layers=3)))


@_family("qwen2", "lm")
def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_decoder_sizes()))


@_family("qwen3", "lm")
def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_decoder_sizes(head_dim=16)))


@_family("mistral", "lm")
def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_decoder_sizes(sliding_window=8)))


@_family("gemma", "lm")
def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_decoder_sizes(head_dim=8)))


@_family("gemma3", "lm")
def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_decoder_sizes(head_dim=16, sliding_window=8)))


@_family("phi3", "lm")
def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_decoder_sizes()))


@_family("mixtral", "lm")
def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder_sizes(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True))
    return MixtralForCausalLM(config)


@_family("t5", "seq2seq")
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=1, relative_attention_num_buckets=8,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@_family("vit", "image")
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


@_family("resnet", "image")
def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


@_family("efficientnet", "image")
def efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.5, depth_divisor=8, kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24], out_channels=[16, 24, 32], depthwise_padding=[], strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 6], hidden_dim=320, num_labels=CLASSES,
    )  # fmt: skip
    model = EfficientNetForImageClassification(config)
    for module in model.modules():  # as a trained one has it: drawn with deviation 0.02, every gradient would vanish
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


@_family("peft_lora", "text")
def peft_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]))


@_family("peft_llama_lora", "lm")
def peft_llama_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1)
    return get_peft_model(llama(), config)


class TorchTransformer(nn.Module):
    """Embedding, `nn.TransformerEncoder`, linear classifier over the mean of the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return _classified(self.classifier((hidden * weights).sum(1) / weights.sum(1)), labels)


class Classified(nn.Module):
    """A plain network that maps its only input to logits, with the cross-entropy beside them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> Output:
        (features,) = inputs.values()
        return _classified(self.network(features), labels)


def _classified(logits: Tensor, labels: Tensor | None) -> Output:
    return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


@_family("torch_transformer_encoder", "text")
def torch_transformer_encoder() -> nn.Module:
    return TorchTransformer()


@_family("mlp", "features")
def mlp() -> nn.Module:
    return Classified(
        nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, CLASSES))
    )


@_family("conv_net", "image")
def conv_net() -> nn.Module:
    return Classified(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    )


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own mean loss of a batch."""
    return model(**batch).loss
