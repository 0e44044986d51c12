from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import PartitionError
from rgft.partition import partition
from tests.families import FAMILIES, Family

PEFT_FAMILIES = [name for name in FAMILIES if name.startswith("peft")]

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    ids = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "num_labels": 3}
    return ModernBertForSequenceClassification(ModernBertConfig(**SIZES, **ids))


def deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", num_labels=3
    )
    return DebertaV2ForSequenceClassification(config)


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=16, num_labels=3))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=60, d_model=32, max_position_embeddings=64, **sides))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {name: n for name, n in SIZES.items() if name != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=16))


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_key_value_heads=2, **experts))


#: Families that only this file looks at.
OTHERS = {
    "modernbert": Family("modernbert", modernbert, "text"), "deberta": Family("deberta", deberta, "text"),
    "albert": Family("albert", albert, "text"), "bart": Family("bart", bart, "seq2seq"),
    "opt": Family("opt", opt, "lm"), "qwen2_moe": Family("qwen2_moe", qwen2_moe, "lm"),
}  # fmt: skip
ZOO = {**FAMILIES, **OTHERS}


@cache
def model_of(family: str) -> nn.Module:
    """Shared between tests that only look."""
    return ZOO[family].build()


def owners(model: nn.Module, split: Partition) -> dict[str, Tensor]:
    """How many components own each trainable element, counted element by element."""
    counts = {
        name: torch.zeros(p.shape, dtype=torch.int)
        for name, p in model.named_parameters()
        if p.requires_grad and p.is_floating_point()
    }
    for component in split:
        for part in component.slices:
            index = [slice(None)] * len(part.shape)
            if part.dim is not None:
                index[part.dim] = slice(part.start, part.stop)
            counts[part.parameter][tuple(index)] += 1
    return counts


def owned_by(split: Partition, **where: object) -> list[str]:
    return [c.name for c in split if all(getattr(c, key) == value for key, value in where.items())]


@pytest.mark.parametrize("ffn_blocks", [1, 4])
@pytest.mark.parametrize("granularity", ["layer", "block", "head", "adapter"])
@pytest.mark.parametrize("family", list(ZOO))
def test_every_trainable_element_is_in_exactly_one_component(family: str, granularity: str, ffn_blocks: int):
    model = model_of(family)
    if granularity == "adapter" and family not in PEFT_FAMILIES:
        with pytest.raises(PartitionError, match=r"no trainable PEFT module.*get_peft_model"):
            partition(model, "adapter", ffn_blocks=ffn_blocks)
        return
    split = partition(model, granularity, ffn_blocks=ffn_blocks)  # type: ignore[arg-type]
    counts = owners(model, split)
    wrong = [name for name, count in counts.items() if not bool((count == 1).all())]
    assert wrong == []
    assert split.numel == sum(count.numel() for count in counts.values())
    assert all(c.slices for c in split)
    depths = [c.depth for c in split]
    assert depths == sorted(depths)
    assert all(0 <= depth <= len(split.layers) + 1 for depth in depths)
    for component in split:
        if component.layer is not None:
            assert split.layers[component.depth - 1] == component.layer
            assert component.name == component.layer or component.name.startswith(f"{component.layer}.")
    for path in split.layers:
        model.get_submodule(path)


@pytest.mark.parametrize(
    ("family", "layers", "before", "after"),
    [
        ("bert", 2, ["bert.embeddings"], ["bert.pooler", "classifier"]),
        ("mpnet", 2, ["mpnet.embeddings", "mpnet.encoder.relative_attention_bias"], ["classifier"]),
        ("distilbert", 2, ["distilbert.embeddings"], ["pre_classifier", "classifier"]),
        ("gpt2", 3, ["transformer.wte", "transformer.wpe"], ["transformer.ln_f"]),
        ("llama", 3, ["model.embed_tokens"], ["model.norm", "lm_head"]),
        ("gemma", 2, ["model.embed_tokens"], ["model.norm"]),
        ("t5", 4, ["shared"], ["decoder.final_layer_norm"]),
        ("vit", 2, ["vit.embeddings"], ["vit.layernorm", "classifier"]),
        ("resnet", 4, ["resnet.embedder"], ["classifier"]),
        (
            "efficientnet", 3, ["efficientnet.embeddings"],
            ["efficientnet.encoder.top_conv", "efficientnet.encoder.top_bn", "classifier"],
        ),
        ("torch_transformer_encoder", 2, ["embedding"], ["classifier"]),
        (
            "albert", 1, ["albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"],
            ["albert.pooler", "classifier"],
        ),
        (
            "opt", 2, [f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "project_in")],
            ["model.decoder.project_out", "model.decoder.final_layer_norm"],
        ),
        (
            "bart", 4,
            ["model.shared", "model.encoder.embed_positions", "model.encoder.layernorm_embedding"], [],
        ),
        (
            "deberta", 2,
            ["deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"],
            ["pooler", "classifier"],
        ),
        ("mlp", 3, [], []),
    ],
)  # fmt: skip
def test_layers_and_what_lies_before_and_after_them(family: str, layers: int, before: list[str], after: list[str]):
    split = partition(model_of(family))
    assert len(split.layers) == layers
    assert owned_by(split, kind="layer") == list(split.layers)
    assert owned_by(split, depth=0) == before
    assert owned_by(split, depth=layers + 1) == after


def test_t5_has_encoder_then_decoder_layers_and_the_encoder_norm_between():
    split = partition(model_of("t5"), "block")
    assert split.layers == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert owned_by(split, depth=2)[-1] == "encoder.final_layer_norm"
    assert owned_by(split, depth=3) == [
        "decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.1.EncDecAttention",
        "decoder.block.0.layer.2.DenseReluDense", "decoder.block.0.rest",
    ]  # fmt: skip


def test_resnet_layers_are_residual_blocks_across_stages():
    split = partition(model_of("resnet"), "block")
    assert split.layers == tuple(f"resnet.encoder.stages.{s}.layers.{b}" for s in (0, 1) for b in (0, 1))
    assert owned_by(split, depth=1) == [
        f"resnet.encoder.stages.0.layers.0.{name}" for name in ("shortcut", "layer.0", "layer.1", "layer.2")
    ]


def test_block_names_and_kinds():
    llama = partition(model_of("llama"), "block")
    assert owned_by(llama, kind="attention") == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert owned_by(llama, kind="ffn") == [f"model.layers.{i}.mlp" for i in range(3)]
    rest = {part.parameter for part in llama["model.layers.1.rest"].slices}
    assert rest == {f"model.layers.1.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    bert = partition(model_of("bert"), "block")
    ffn = {part.parameter for part in bert["bert.encoder.layer.0.ffn"].slices}
    assert ffn == {
        f"bert.encoder.layer.0.{name}.{kind}"
        for name in ("intermediate.dense", "output.dense", "output.LayerNorm")
        for kind in ("weight", "bias")
    }


def test_rest_of_a_block_holds_norms_output_biases_and_relative_tables():
    def rest(family: str, name: str) -> set[str]:
        return {part.parameter[len(name) - 4 :] for part in partition(model_of(family), "head")[name].slices}

    assert rest("bert", "bert.encoder.layer.1.attention.rest") == {
        "output.dense.bias", "output.LayerNorm.weight", "output.LayerNorm.bias",
    }  # fmt: skip
    assert rest("qwen3", "model.layers.0.self_attn.rest") == {"q_norm.weight", "k_norm.weight"}
    assert rest("t5", "decoder.block.0.layer.0.SelfAttention.rest") == {"relative_attention_bias.weight"}
    assert rest("gpt2", "transformer.h.0.mlp.rest") == {"c_proj.bias"}


#: family, layer, attention block, output projection, number of heads (key/value groups)
ATTENTION_BLOCKS = [
    ("bert", "bert.encoder.layer.0", "attention", "attention.output.dense", 4),
    ("distilbert", "distilbert.transformer.layer.0", "attention", "attention.out_lin", 4),
    ("mpnet", "mpnet.encoder.layer.0", "attention", "attention.attn.o", 4),
    ("gpt2", "transformer.h.0", "attn", "attn.c_proj", 4),
    ("gpt_neox", "gpt_neox.layers.0", "attention", "attention.dense", 4),
    ("llama", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("qwen2", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("qwen3", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("gemma3", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("phi3", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("mixtral", "model.layers.0", "self_attn", "self_attn.o_proj", 2),
    ("vit", "vit.layers.0", "attention", "attention.o_proj", 4),
    ("modernbert", "model.layers.0", "attn", "attn.Wo", 4),
    ("deberta", "deberta.encoder.layer.0", "attention", "attention.output.dense", 4),
    ("bart", "model.decoder.layers.0", "encoder_attn", "encoder_attn.out_proj", 4),
    ("t5", "encoder.block.0", "layer.0.SelfAttention", "layer.0.SelfAttention.o", 4),
    ("t5", "decoder.block.0", "layer.1.EncDecAttention", "layer.1.EncDecAttention.o", 4),
]

#: family, layer, FFN block, down projection
FFN_BLOCKS = [
    ("bert", "bert.encoder.layer.0", "ffn", "output.dense"),
    ("distilbert", "distilbert.transformer.layer.0", "ffn", "ffn.lin2"),
    ("gpt2", "transformer.h.0", "mlp", "mlp.c_proj"),
    ("gpt_neox", "gpt_neox.layers.0", "mlp", "mlp.dense_4h_to_h"),
    ("llama", "model.layers.0", "mlp", "mlp.down_proj"),
    ("phi3", "model.layers.0", "mlp", "mlp.down_proj"),
    ("vit", "vit.layers.0", "mlp", "mlp.fc2"),
    ("modernbert", "model.layers.0", "mlp", "mlp.Wo"),
    ("qwen2_moe", "model.layers.0", "mlp.shared_expert", "mlp.shared_expert.down_proj"),
    ("t5", "encoder.block.0", "layer.1.DenseReluDense", "layer.1.DenseReluDense.wo"),
    ("torch_transformer_encoder", "encoder.layers.0", "ffn", "linear2"),
]


def input_and_output(family: str, model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """What the module at `path` reads and gives, in eval mode, without padded positions' garbage mattering."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output.clone())))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model.eval()(**ZOO[family].batch())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        handle.remove()
    return seen[0]


def is_column_slice(part: ParameterSlice, path: str) -> bool:
    return part.parameter == f"{path}.weight"


def changed_features(
    family: str, component: Component, output: str, change: Callable[[Tensor], object]
) -> tuple[Tensor, int]:
    """Which input features of `output` change when the rows of the component do; and how many features there are."""
    model = ZOO[family].build()
    before, _ = input_and_output(family, model, output)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in component.slices:
            if not is_column_slice(part, output):
                change(part.of(parameters[part.parameter]))
    after, _ = input_and_output(family, model, output)
    difference = (after - before).abs().reshape(-1, before.shape[-1]).amax(0)
    return (difference > 1e-7).nonzero().flatten(), before.shape[-1]


def add_noise(tensor: Tensor) -> None:
    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("family", "layer", "block", "output", "heads"), ATTENTION_BLOCKS)
def test_rows_of_a_head_move_its_own_context_and_no_other(family: str, layer: str, block: str, output: str, heads: int):
    split = partition(model_of(family), "head")
    found = [c for c in split if c.kind == "head" and c.name.startswith(f"{layer}.{block}.head.")]
    assert [c.index for c in found] == list(range(heads))
    for index in (0, heads - 1):
        changed, width = changed_features(family, found[index], f"{layer}.{output}", add_noise)
        share = width // heads
        assert changed.tolist() == list(range(index * share, (index + 1) * share))


@pytest.mark.parametrize(("family", "layer", "block", "output"), FFN_BLOCKS)
def test_rows_of_a_neuron_block_move_its_own_neurons_and_no_other(family: str, layer: str, block: str, output: str):
    split = partition(model_of(family), "head", ffn_blocks=3)
    width = 0
    reached: list[int] = []
    for index in range(3):
        component = split[f"{layer}.{block}.ffn_block.{index}"]
        changed, width = changed_features(family, component, f"{layer}.{output}", lambda t: t.add_(1.0))
        columns = next(part for part in component.slices if is_column_slice(part, f"{layer}.{output}"))
        assert set(changed.tolist()) <= set(range(columns.start, columns.stop))
        assert len(changed) > 0.5 * (columns.stop - columns.start)
        reached += range(columns.start, columns.stop)
    assert reached == list(range(width))


@pytest.mark.parametrize(("family", "layer", "block", "output", "heads"), ATTENTION_BLOCKS)
def test_columns_of_a_head_take_away_its_own_contribution(family: str, layer: str, block: str, output: str, heads: int):
    component = partition(model_of(family), "head")[f"{layer}.{block}.head.1"]
    model = ZOO[family].build()
    path = f"{layer}.{output}"
    context, before = input_and_output(family, model, path)
    share = context.shape[-1] // heads
    module = model.get_submodule(path)
    matrix = module.weight.detach().clone() if hasattr(module, "nf") else module.weight.detach().T.clone()
    (columns,) = (part for part in component.slices if is_column_slice(part, path))
    with torch.no_grad():
        columns.of(module.weight).zero_()
    _, after = input_and_output(family, model, path)
    expected = context[..., share : 2 * share] @ matrix[share : 2 * share]
    torch.testing.assert_close(before - after, expected, atol=1e-5, rtol=1e-4)


def test_torch_attention_heads_are_rows_of_the_packed_projection():
    model = FAMILIES["torch_transformer_encoder"].build().eval()
    split = partition(model, "head")
    attention = model.get_submodule("encoder.layers.0.self_attn")
    assert isinstance(attention, nn.MultiheadAttention)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))

    def output() -> Tensor:
        with torch.no_grad():
            return attention(x, x, x, need_weights=False)[0]

    parameters = dict(model.named_parameters())
    before = output()
    with torch.no_grad():  # without the columns of head 2, its rows must not matter any more; those of head 1 still do
        for part in split["encoder.layers.0.self_attn.head.2"].slices:
            if "out_proj" in part.parameter:
                part.of(parameters[part.parameter]).zero_()
        without = output()
        for part in split["encoder.layers.0.self_attn.head.2"].slices:
            add_noise(part.of(parameters[part.parameter])) if "in_proj" in part.parameter else None
        assert not torch.allclose(before, without)
        torch.testing.assert_close(output(), without)
        for part in split["encoder.layers.0.self_attn.head.1"].slices:
            add_noise(part.of(parameters[part.parameter])) if "in_proj" in part.parameter else None
        assert not torch.allclose(output(), without)


def test_gqa_head_is_a_group_of_query_heads_with_its_keys():
    head = partition(model_of("llama"), "head")["model.layers.2.self_attn.head.1"]
    found = {part.parameter.split(".")[-2]: (part.dim, part.start, part.stop) for part in head.slices}
    assert found == {"q_proj": (0, 16, 32), "k_proj": (0, 8, 16), "v_proj": (0, 8, 16), "o_proj": (1, 16, 32)}


def test_experts_and_router():
    split = partition(model_of("mixtral"), "head")
    assert owned_by(split, kind="expert", depth=1) == [f"model.layers.0.mlp.expert.{i}" for i in range(4)]
    assert [(p.dim, p.start, p.stop) for p in split["model.layers.0.mlp.expert.2"].slices] == [(0, 2, 3), (0, 2, 3)]
    (router,) = split["model.layers.1.mlp.router"].slices
    assert router.parameter == "model.layers.1.mlp.gate.weight"


class ExpertList(nn.Module):
    """A decoder layer whose experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.num_heads = 2
        for name in "qkvo":
            self.self_attn.add_module(f"{name}_proj", nn.Linear(8, 8))
        self.block_sparse_moe = nn.Module()
        self.block_sparse_moe.gate = nn.Linear(8, 3, bias=False)
        self.block_sparse_moe.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)) for _ in range(3))


def test_experts_that_are_modules_are_components():
    split = partition(nn.ModuleList(ExpertList() for _ in range(2)), "head")
    assert owned_by(split, layer="1", kind="head") == ["1.self_attn.head.0", "1.self_attn.head.1"]
    assert owned_by(split, layer="1", kind="expert") == [f"1.block_sparse_moe.expert.{i}" for i in range(3)]
    assert [part.parameter for part in split["1.block_sparse_moe.expert.2"].slices] == [
        f"1.block_sparse_moe.experts.2.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]
    assert split["0.block_sparse_moe.router"].numel == 24


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"_fc": nn.Linear(4, 2)}, {"_fc": "classifier"}),
        ({"heads": nn.Sequential(nn.Dropout(), nn.Linear(4, 2))}, {"heads": "classifier"}),
        ({"mix": nn.Linear(4, 4), "out": nn.Linear(4, 2)}, {"mix": "other", "out": "classifier"}),
        ({"classifier": nn.Linear(4, 2), "gate": nn.Linear(4, 4)}, {"classifier": "classifier", "gate": "other"}),
        ({"out": nn.Linear(4, 2), "act": nn.PReLU()}, {"out": "classifier", "act": "other"}),
        ({"last_norm": nn.LayerNorm(4)}, {"last_norm": "norm"}),
    ],
)
def test_the_last_linear_layer_is_the_classifier_whatever_its_name(
    after: dict[str, nn.Module], expected: dict[str, str]
):
    model = nn.Module()
    model.add_module("blocks", nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)]))
    for name, module in after.items():
        model.add_module(name, module)
    assert {c.name: c.kind for c in partition(model) if c.depth == 4} == expected


def test_layer_1_is_not_layer_10():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    model = BertModel(config)
    for granularity in ("layer", "block", "head"):
        split = partition(model, granularity)  # type: ignore[arg-type]
        assert split.layers == tuple(f"encoder.layer.{i}" for i in range(12))
        for component in split:
            if component.layer is not None:
                assert {".".join(part.parameter.split(".")[:3]) for part in component.slices} == {component.layer}


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma3", "t5"])
def test_tied_embeddings_sit_once_at_the_bottom(family: str):
    model = model_of(family)
    split = partition(model, "head")
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    assert model.get_output_embeddings().weight is table  # type: ignore[operator]
    names = [name for name, p in model.named_parameters() if p is table]
    assert [c.depth for c in split if any(part.parameter in names for part in c.slices)] == [0]
    assert owned_by(split, kind="lm_head") == []


@pytest.mark.parametrize(("outputs", "kind"), [(11, "lm_head"), (3, "classifier")])
@pytest.mark.parametrize("is_nested", [False, True])
def test_what_is_called_cls_is_known_by_its_width(outputs: int, kind: str, *, is_nested: bool):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.embed_tokens = nn.Embedding(11, 8)
            self.encoder = nn.TransformerEncoder(layer, 2)
            head = nn.Linear(8, outputs)
            self.cls = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), head) if is_nested else head

    (component,) = (c for c in partition(Encoder()) if c.name == "cls")
    assert component.kind == kind


def test_tied_weight_registered_first_at_the_top_still_sits_at_its_lowest_use():
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.lm_head = nn.Linear(8, 11, bias=False)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.embed_tokens = nn.Embedding(11, 8)
            self.embed_tokens.weight = self.lm_head.weight

    split = partition(HeadFirst())
    (part,) = split["embed_tokens"].slices
    assert part.parameter == "lm_head.weight"
    assert split["embed_tokens"].depth == 0


def test_peft_modules_are_components():
    split = partition(model_of("peft_lora"), "adapter")
    layer = "base_model.model.bert.encoder.layer"
    assert owned_by(split, kind="adapter") == [
        f"{layer}.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    ]
    pair = [part.parameter.split(".")[-3] for part in split[f"{layer}.1.attention.self.value"].slices]
    assert pair == ["lora_A", "lora_B"]
    assert split["base_model.model.classifier"].kind == "classifier"
    assert split["base_model.model.classifier"].depth == 3
    assert len(split.layers) == 2


def test_unfrozen_base_weights_below_peft_are_split_into_heads():
    model = FAMILIES["peft_llama_lora"].build()
    model.requires_grad_(True)
    split = partition(model, "head", ffn_blocks=2)
    assert all(bool((count == 1).all()) for count in owners(model, split).values())
    names = [part.parameter for part in split["base_model.model.model.layers.0.self_attn.head.0"].slices]
    assert names[0].endswith("q_proj.base_layer.weight")
    assert split["base_model.model.model.layers.0.mlp.up_proj"].kind == "adapter"


def test_prompt_tuning_sits_before_the_layers():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(FAMILIES["gpt2"].build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    (component,) = partition(model, "adapter")
    assert (component.kind, component.depth, component.numel) == ("adapter", 0, 64)


def test_frozen_and_integer_parameters_are_left_out():
    model = FAMILIES["bert"].build()
    model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").requires_grad_(False)
    model.get_submodule("bert.encoder.layer.1").requires_grad_(False)
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    split = partition(model, "head")
    assert all(bool((count == 1).all()) for count in owners(model, split).values())
    assert owned_by(split, depth=2) == []
    assert len(split.layers) == 2
    head = [part.parameter for part in split["bert.encoder.layer.0.attention.head.0"].slices]
    assert "bert.encoder.layer.0.attention.self.query.weight" not in head
    assert "bert.encoder.layer.0.attention.self.query.bias" in head


class Mixer(nn.Module):
    """A layer whose attention and FFN follow no known naming."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.odd_attention = nn.ModuleDict({"all_in_one": nn.Linear(8, 8)})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def strange_model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(5, 8), "layers": nn.ModuleList(Mixer() for _ in range(2))})


def test_unknown_attention_is_refused_at_head_granularity_and_works_at_block():
    model = strange_model()
    with pytest.raises(PartitionError) as caught:
        partition(model, "head")
    message = str(caught.value)
    assert "layers.0.odd_attention.all_in_one.weight" in message
    assert "layers.1" in message
    assert "granularity='block'" in message
    assert "function" in message
    assert owned_by(partition(model, "block"), depth=1) == [
        "layers.0.odd_attention", "layers.0.mlp.0", "layers.0.mlp.2", "layers.0.rest",
    ]  # fmt: skip


def test_unknown_ffn_beside_known_attention_is_refused_at_head_granularity():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.1.mlp").extra = nn.Linear(4, 4)  # part of a known block: its rest
    assert "model.layers.1.mlp.rest" in partition(model, "head").names
    model.get_submodule("model.layers.1").second_mlp = nn.Linear(4, 4)
    with pytest.raises(PartitionError, match=r"model\.layers\.1: .*second_mlp\.weight"):
        partition(model, "head")
    assert partition(model, "block")["model.layers.1.second_mlp"].numel == 20


def test_head_counts_that_contradict_the_shapes_are_refused():
    model = FAMILIES["llama"].build()
    setattr(model.get_submodule("model.layers.0.self_attn"), "num_key_value_groups", 4)  # noqa: B010
    with pytest.raises(PartitionError, match=r"model\.layers\.0: .*1 key/value heads.*k_proj.*16 features, expected 8"):
        partition(model, "head")


def test_users_function():
    model = model_of("mlp")
    weight = "network.2.weight"

    def by_rows(module: nn.Module) -> dict[str, list[str | ParameterSlice]]:
        half = [ParameterSlice(parameter=weight, shape=(48, 48), dim=0, start=i * 24, stop=i * 24 + 24) for i in (0, 1)]
        others = [name for name, _ in module.named_parameters() if name != weight]
        return {"low": [half[0]], "high": [half[1]], "others": others}

    split = partition(model, by_rows)
    assert split.granularity == "custom"
    assert split["low"].layer == "network.2"
    assert (split["low"].depth, split["others"].depth, split["others"].layer) == (2, 1, None)
    assert all(bool((count == 1).all()) for count in owners(model, split).values())


def test_a_users_function_leaves_the_classifier_what_it_is():
    model = model_of("bert")
    split = partition(model, lambda module: {name: [name] for name, _ in module.named_parameters()})
    kinds = {name: component.kind for name, component in split.by_name.items()}
    assert kinds["classifier.weight"] == kinds["bert.pooler.dense.bias"] == "classifier"
    assert {kind for name, kind in kinds.items() if "embeddings" in name} == {"embedding"}
    assert {kind for name, kind in kinds.items() if ".layer." in name} == {"other"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model: {"a": ["network.0.weight"]}, "'network.2.weight' of shape"),
        (lambda model: {"a": ["network.9.weight"], "b": []}, r"(?s)'network\.9\.weight'.*'b' owns nothing"),
        (
            lambda model: {"a": [n for n, _ in model.named_parameters()], "b": ["network.0.bias"]},
            r"'network\.0\.bias' is in several: (a, b|b, a)",
        ),
    ],
)
def test_users_function_that_does_not_cover(function: Callable[[nn.Module], dict[str, list[str]]], message: str):
    with pytest.raises(PartitionError, match=message):
        partition(model_of("mlp"), function)


def test_bad_arguments():
    model = model_of("bert")
    with pytest.raises(PartitionError, match=r"one of layer, block, head, adapter or a function, found 'heads'"):
        partition(model, "heads")  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match=r"ffn_blocks: expected an integer >= 1, found 0"):
        partition(model, "head", ffn_blocks=0)
    with pytest.raises(PartitionError, match=r"48 neurons, too few for ffn_blocks=49"):
        partition(model, "head", ffn_blocks=49)
    frozen = FAMILIES["bert"].build().requires_grad_(False)
    with pytest.raises(PartitionError, match=r"no trainable parameter"):
        partition(frozen)


def test_single_layer_model_and_single_head():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    split = partition(LlamaForCausalLM(config), "head")
    assert split.layers == ("model.layers.0",)
    assert split.family == "llama"
    assert all(part.is_whole for part in split["model.layers.0.self_attn.head.0"].slices)
    assert all(part.is_whole for part in split["model.layers.0.mlp.ffn_block.0"].slices)


def test_bare_layer_has_no_layers():
    split = partition(nn.Linear(3, 2))
    assert (split.names, split.layers, split.numel, split.max_cut) == (("weight", "bias"), (), 8, 0)


# ---------------------------------------------------------------- convolutions


def parts(component: Component) -> dict[str, tuple[int, int]]:
    """Last two names of each parameter that the component has a slice of, and the slice."""
    assert all(part.dim == 0 for part in component.slices)
    return {".".join(part.parameter.split(".")[-2:]): (part.start, part.stop) for part in component.slices}


def layers_of(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "layers": nn.ModuleList(make() for _ in range(2))})


class Ordered(nn.Module):
    """Children by name, in the order given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_channel_blocks_hold_kernels_and_their_part_of_the_norm():
    split = partition(model_of("resnet"), "head", ffn_blocks=4)
    stage = "resnet.encoder.stages.1.layers.0"
    assert [c.name for c in split if c.layer == stage and c.kind == "channel_block"] == [
        f"{stage}.{conv}.convolution.channel_block.{i}"
        for conv in ("shortcut", "layer.0", "layer.1", "layer.2") for i in range(4)
    ]  # fmt: skip
    block = split[f"{stage}.layer.2.convolution.channel_block.3"]
    assert (block.index, block.depth) == (3, 3)
    assert parts(block) == dict.fromkeys(("convolution.weight", "normalization.weight", "normalization.bias"), (24, 32))
    assert owned_by(split, depth=0) == ["resnet.embedder"]


def test_channel_blocks_of_an_inverted_bottleneck():
    split = partition(model_of("efficientnet"), "head", ffn_blocks=4)
    layer = "efficientnet.encoder.blocks.1"
    names = [c.name[len(layer) + 1 :] for c in split if c.layer == layer]
    assert names == [
        *(f"expansion.expand_conv.channel_block.{i}" for i in range(4)),
        *(f"depthwise_conv.depthwise_conv.channel_block.{i}" for i in range(4)),
        *(f"squeeze_excite.reduce.channel_block.{i}" for i in range(2)),  # it has two channels
        *(f"squeeze_excite.expand.channel_block.{i}" for i in range(4)),
        *(f"projection.project_conv.channel_block.{i}" for i in range(4)),
    ]
    depthwise = split[f"{layer}.depthwise_conv.depthwise_conv.channel_block.1"]
    assert parts(depthwise) == dict.fromkeys(
        ("depthwise_conv.weight", "depthwise_norm.weight", "depthwise_norm.bias"), (12, 24)
    )
    squeeze = split[f"{layer}.squeeze_excite.expand.channel_block.0"]
    assert parts(squeeze) == {"expand.weight": (0, 12), "expand.bias": (0, 12)}


def test_one_channel_block_is_the_convolution_with_its_norm():
    split = partition(model_of("conv_net"), "head")
    assert split.names == (
        "network.0.channel_block.0",
        "network.1",
        "network.3.channel_block.0",
        "network.4",
        "network.8",
    )
    assert all(part.is_whole for part in split["network.0.channel_block.0"].slices)


@pytest.mark.parametrize(
    ("groups", "blocks", "bounds"),
    [
        (1, 5, (0, 4, 9, 14, 19, 24)),
        (8, 4, (0, 6, 12, 18, 24)),
        (8, 3, (0, 6, 15, 24)),  # whole groups of three channels
        (3, 4, (0, 6, 12, 18, 24)),  # more blocks than groups
        (24, 5, (0, 4, 9, 14, 19, 24)),
        (1, 50, tuple(range(25))),
    ],
)
def test_bounds_of_channel_blocks(groups: int, blocks: int, bounds: tuple[int, ...]):
    model = layers_of(lambda: Ordered(conv=nn.Conv2d(24, 24, 3, groups=groups)))
    found = [parts(c)["conv.weight"] for c in partition(model, "head", ffn_blocks=blocks) if c.depth == 1]
    assert found == list(pairwise(bounds))


@pytest.mark.parametrize(
    ("children", "owned"),
    [
        (["conv1", "bn1", "conv2", "bn2"], {"bn1": "conv1", "bn2": "conv2"}),
        (["bn1", "conv1", "bn2", "conv2"], {"bn2": "conv1"}),
        (["conv1", "conv2", "bn1", "bn2"], {}),
        (["conv1", "conv2", "bn1"], {"bn1": "conv2"}),
        (["conv1", "ln"], {}),
        (["conv1", "wide"], {}),
        (["conv1", "linear", "bn1"], {}),
    ],
)
def test_a_norm_is_split_where_the_order_shows_whose_it_is(children: list[str], owned: dict[str, str]):
    kinds: dict[str, Callable[[], nn.Module]] = {
        "conv1": lambda: nn.Conv2d(8, 8, 3), "conv2": lambda: nn.Conv2d(8, 8, 1), "bn1": lambda: nn.BatchNorm2d(8),
        "bn2": lambda: nn.BatchNorm2d(8), "ln": lambda: nn.GroupNorm(2, 8), "wide": lambda: nn.BatchNorm2d(16),
        "linear": lambda: nn.Linear(8, 8),
    }  # fmt: skip
    model = layers_of(lambda: Ordered(**{name: kinds[name]() for name in children}))
    split = partition(model, "head", ffn_blocks=2)
    assert all(bool((count == 1).all()) for count in owners(model, split).values())
    found = {
        part.parameter.split(".")[2]: component.name.split(".")[2]
        for component in split if component.depth == 1 and component.kind == "channel_block"
        for part in component.slices if part.parameter.split(".")[2] != component.name.split(".")[2]
    }  # fmt: skip
    assert found == owned


def test_what_is_no_plain_or_trainable_convolution_stays_whole():
    def layer() -> nn.Module:
        parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        return Ordered(
            up=nn.ConvTranspose2d(8, 8, 3), normed=parametrized, frozen=nn.Conv2d(8, 8, 3), on=nn.Conv2d(8, 8, 1)
        )

    model = layers_of(layer)
    for path in ("layers.0", "layers.1"):
        model.get_parameter(f"{path}.frozen.weight").requires_grad_(False)
    split = partition(model, "head", ffn_blocks=2)
    assert owned_by(split, depth=1) == [
        "layers.0.up", "layers.0.normed", "layers.0.frozen",
        "layers.0.on.channel_block.0", "layers.0.on.channel_block.1",
    ]  # fmt: skip
    assert [part.parameter for part in split["layers.0.frozen"].slices] == ["layers.0.frozen.bias"]


def test_adapters_of_convolutions_stay_whole():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(FAMILIES["resnet"].build(), LoraConfig(r=2, target_modules=["convolution"]))
    split = partition(model, "head", ffn_blocks=4)
    assert {c.kind for c in split} == {"adapter"}
    model.requires_grad_(True)
    split = partition(model, "head", ffn_blocks=2)
    assert all(bool((count == 1).all()) for count in owners(model, split).values())
    name = "base_model.model.resnet.encoder.stages.0.layers.0.layer.0.convolution"
    assert split[name].kind == "adapter"
    assert parts(split[f"{name}.base_layer.channel_block.1"])["base_layer.weight"] == (2, 4)


def test_convolutions_beside_attention():
    def layer() -> nn.Module:
        module = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        module.add_module("conv", nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1)))
        return module

    model = layers_of(layer)
    split = partition(model, "head", ffn_blocks=2)
    assert all(bool((count == 1).all()) for count in owners(model, split).values())
    assert owned_by(split, depth=1, kind="channel_block") == [
        f"layers.0.conv.{i}.channel_block.{j}" for i in (0, 2) for j in (0, 1)
    ]
    assert "1.bias" in parts(split["layers.0.conv.0.channel_block.1"])
    block = partition(model, "block")
    assert owned_by(block, depth=1, kind="conv_block") == ["layers.0.conv.0", "layers.0.conv.2"]
