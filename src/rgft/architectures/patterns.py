"""Names of the modules inside a layer, per architecture: plain strings, relative to the layer, matched exactly.

A pattern fits a layer when every module that it names exists there; no part of a name is ever matched. New families
with known names need nothing, new names need one line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map whose output features are heads or neurons.

    Attributes:
        module: path relative to the layer.
        parts: what the output features are, in order: of `q`, `k`, `v` in attention; of `gate`, `up` in an FFN.
        interleaved: whether the parts alternate head by head (GPT-NeoX, BLOOM) instead of following each other whole.
        weight, bias: names of the parameters inside the module.
    """

    module: str
    parts: tuple[str, ...]
    interleaved: bool = False
    weight: str = "weight"
    bias: str = "bias"


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """An attention or feed-forward block of a layer.

    Attributes:
        family: name of the table.
        kind: what the block is.
        name: how the block is called below its layer; its module's path, when it is one module.
        members: module paths whose parameters belong to the block.
        inputs: projections that read the layer's hidden states; their output features are split.
        output: path of the projection whose input features are split.
    """

    family: str
    kind: str
    name: str
    members: tuple[str, ...]
    inputs: tuple[Projection, ...]
    output: str


@dataclass(frozen=True, kw_only=True)
class ExpertsPattern:
    """A mixture-of-experts block: `experts` holds either fused parameters of shape [experts, …] or one child each.

    Attributes:
        name: module path of the block.
        experts: module path of the experts.
        routers: module paths that route; those that exist form one component.
    """

    name: str
    experts: str
    routers: tuple[str, ...]


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at exactly this path (the root itself for an empty one), or None."""
    module: nn.Module | None = root
    for name in path.split(".") if path else ():
        module = module._modules.get(name) if module is not None else None
    return module


def unwrapped(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module below PEFT's wrappers, and its path."""
    while isinstance(base := module._modules.get("base_layer"), nn.Module):
        module, path = base, f"{path}.base_layer"
    return module, path


def has(layer: nn.Module, projection: Projection) -> bool:
    """Whether the layer has the projection's module and weight."""
    module = find(layer, projection.module)
    return module is not None and getattr(unwrapped(module, "")[0], projection.weight, None) is not None


def _attention(family: str, block: str, inputs: str, output: str, parts: str = "q k v") -> BlockPattern:
    names = tuple(f"{block}.{name}" for name in inputs.split())
    return BlockPattern(
        family=family, kind="attention", name=block, members=(block,), output=f"{block}.{output}",
        inputs=tuple(Projection(module=n, parts=(p,)) for n, p in zip(names, parts.split(), strict=True)),
    )  # fmt: skip


def _fused(family: str, block: str, qkv: str, output: str, *, interleaved: bool = False) -> BlockPattern:
    return BlockPattern(
        family=family, kind="attention", name=block, members=(block,), output=f"{block}.{output}",
        inputs=(Projection(module=f"{block}.{qkv}", parts=("q", "k", "v"), interleaved=interleaved),),
    )  # fmt: skip


def _torch_attention(block: str) -> BlockPattern:
    return BlockPattern(
        family="torch", kind="attention", name=block, members=(block,), output=f"{block}.out_proj",
        inputs=(Projection(module=block, parts=("q", "k", "v"), weight="in_proj_weight", bias="in_proj_bias"),),
    )  # fmt: skip


ATTENTION: tuple[BlockPattern, ...] = (
    _attention("bert", "attention", "self.query self.key self.value", "output.dense"),
    _attention("bert", "crossattention", "self.query self.key self.value", "output.dense"),
    _attention("albert", "attention", "query key value", "dense"),
    _attention("deberta", "attention", "self.query_proj self.key_proj self.value_proj", "output.dense"),
    _fused("modernbert", "attn", "Wqkv", "Wo"),
    _attention("distilbert", "attention", "q_lin k_lin v_lin", "out_lin"),
    _attention("mpnet", "attention", "attn.q attn.k attn.v", "attn.o"),
    _fused("gpt2", "attn", "c_attn", "c_proj"),
    BlockPattern(
        family="gpt2", kind="attention", name="crossattention", members=("crossattention",),
        inputs=(
            Projection(module="crossattention.q_attn", parts=("q",)),
            Projection(module="crossattention.c_attn", parts=("k", "v")),
        ),
        output="crossattention.c_proj",
    ),
    _attention("gpt_neo", "attn", "attention.q_proj attention.k_proj attention.v_proj", "attention.out_proj"),
    _attention("gptj", "attn", "q_proj k_proj v_proj", "out_proj"),
    _fused("gpt_neox", "attention", "query_key_value", "dense", interleaved=True),
    _fused("bloom", "self_attention", "query_key_value", "dense", interleaved=True),
    _attention("llama", "self_attn", "q_proj k_proj v_proj", "o_proj"),
    _fused("phi3", "self_attn", "qkv_proj", "o_proj"),
    _attention("phi", "self_attn", "q_proj k_proj v_proj", "dense"),
    _attention("bart", "self_attn", "q_proj k_proj v_proj", "out_proj"),
    _attention("bart", "encoder_attn", "q_proj k_proj v_proj", "out_proj"),
    _attention("t5", "layer.0.SelfAttention", "q k v", "o"),
    _attention("t5", "layer.1.EncDecAttention", "q k v", "o"),
    _attention("vit", "attention", "q_proj k_proj v_proj", "o_proj"),
    _attention("vit", "attention", "attention.query attention.key attention.value", "output.dense"),
    _torch_attention("self_attn"),
    _torch_attention("multihead_attn"),
)  # fmt: skip


def _ffn(family: str, name: str, inputs: str, output: str, parts: str = "up", members: str = "") -> BlockPattern:
    projections = inputs.split()
    each = parts.split()
    fused = len(projections) == 1
    return BlockPattern(
        family=family, kind="ffn", name=name, members=tuple(members.split()) or (name,), output=output,
        inputs=(Projection(module=inputs, parts=tuple(each)),) if fused
        else tuple(Projection(module=n, parts=(p,)) for n, p in zip(projections, each, strict=True)),
    )  # fmt: skip


def _gated(family: str, name: str) -> BlockPattern:
    return _ffn(family, name, f"{name}.gate_proj {name}.up_proj", f"{name}.down_proj", "gate up")


def _t5_ffn(name: str) -> tuple[BlockPattern, BlockPattern]:
    return (
        _ffn("t5", name, f"{name}.wi", f"{name}.wo"),
        _ffn("t5", name, f"{name}.wi_0 {name}.wi_1", f"{name}.wo", "gate up"),
    )


FFN: tuple[BlockPattern, ...] = (
    _ffn("bert", "ffn", "intermediate.dense", "output.dense", members="intermediate output"),
    _ffn("albert", "ffn", "ffn", "ffn_output", members="ffn ffn_output"),
    _ffn("modernbert", "mlp", "mlp.Wi", "mlp.Wo", "up gate"),
    _ffn("distilbert", "ffn", "ffn.lin1", "ffn.lin2"),
    _ffn("gpt2", "mlp", "mlp.c_fc", "mlp.c_proj"),
    _ffn("gptj", "mlp", "mlp.fc_in", "mlp.fc_out"),
    _ffn("gpt_neox", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    _gated("llama", "mlp"),
    _gated("moe", "mlp.shared_expert"),
    _gated("moe", "mlp.shared_experts"),
    _ffn("phi3", "mlp", "mlp.gate_up_proj", "mlp.down_proj", "gate up"),
    _ffn("vit", "mlp", "mlp.fc1", "mlp.fc2"),
    _ffn("bart", "ffn", "fc1", "fc2", members="fc1 fc2"),
    _ffn("torch", "ffn", "linear1", "linear2", members="linear1 linear2"),
    *_t5_ffn("layer.1.DenseReluDense"),
    *_t5_ffn("layer.2.DenseReluDense"),
)

EXPERTS: tuple[ExpertsPattern, ...] = (
    ExpertsPattern(
        name="mlp", experts="mlp.experts", routers=("mlp.gate", "mlp.router", "mlp.shared_expert_gate")
    ),
    ExpertsPattern(
        name="block_sparse_moe", experts="block_sparse_moe.experts",
        routers=("block_sparse_moe.gate", "block_sparse_moe.router"),
    ),
    ExpertsPattern(name="feed_forward", experts="feed_forward.experts", routers=("feed_forward.router",)),
)  # fmt: skip

#: Ends of module paths outside the layers that run before them although they are registered after.
RUNS_BEFORE_LAYERS = ("encoder.relative_attention_bias", "encoder.rel_embeddings", "deberta.encoder.LayerNorm")

#: Last names of modules outside the layers that run after them, wherever they are registered.
RUNS_AFTER_LAYERS = (
    "final_layer_norm", "final_layernorm", "final_norm", "ln_f", "norm_f", "classifier", "pooler", "score",
    "qa_outputs", "project_out",
)  # fmt: skip

#: Last names of modules that map hidden states to the vocabulary.
LM_HEADS = ("lm_head", "embed_out", "generator_lm_head", "vocab_projector", "vocab_transform")

#: Last names of modules that belong to a task's head: pooler, projections and classifier.
CLASSIFIERS = (
    "classifier", "pre_classifier", "score", "pooler", "qa_outputs", "classification_head", "seq_relationship", "fc",
    "head", "cls_classifier", "distillation_classifier", "summary",
)  # fmt: skip

#: Last names of modules that are the one or the other, by whether they map to the vocabulary.
LM_HEADS_OR_CLASSIFIERS = ("cls",)


def matches(layer: nn.Module, patterns: tuple[BlockPattern, ...]) -> Iterator[BlockPattern]:
    """The patterns that fit the layer, at most one per output projection."""
    taken: set[str] = set()
    for pattern in patterns:
        if pattern.output in taken or find(layer, pattern.output) is None:
            continue
        if all(has(layer, projection) for projection in pattern.inputs):
            taken.add(pattern.output)
            yield pattern


def match_experts(layer: nn.Module) -> ExpertsPattern | None:
    """The mixture-of-experts pattern that fits the layer, or None."""
    return next((pattern for pattern in EXPERTS if find(layer, pattern.experts) is not None), None)
