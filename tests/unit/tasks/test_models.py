from pathlib import Path

import pytest
import torch

from rgft.errors import DataError
from rgft.tasks.models import load_causal_lm, load_classifier, positions_of, require_causal_kind
from tests.decoders import save_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("model"))


def test_weights_are_fp32_whatever_the_checkpoint_has(folder: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = load_causal_lm(folder, pad_token_id=0)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    half = load_causal_lm(str(tmp_path), pad_token_id=0)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for left, right in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right.bfloat16().float())
    classifier = load_classifier(str(tmp_path), labels=3, seed=0, pad_token_id=0)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}


def test_a_configuration_without_padding_gets_the_tokenizers(folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(folder, pad_token_id=5)
    assert model.config.pad_token_id == 0
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path), pad_token_id=5).config.pad_token_id == 5


def test_a_checkpoint_without_a_head_is_no_language_model(folder: str, tmp_path: Path) -> None:
    load_classifier(folder, labels=3, seed=0, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"found none for lm_head\.weight; .* one of LlamaForSequenceClassification"):
        load_causal_lm(str(tmp_path), pad_token_id=0)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="expected a decoder, found BertLMHeadModel, which sees the tokens"):
        load_causal_lm(str(tmp_path), pad_token_id=0)


def test_other_kinds_of_decoders_pass(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20}
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)).save_pretrained(tmp_path / "gpt2")
    MixtralForCausalLM(
        MixtralConfig(**shape, num_key_value_heads=1, intermediate_size=24, num_local_experts=2)
    ).save_pretrained(tmp_path / "mixtral")
    for name in ("gpt2", "mixtral"):
        assert load_causal_lm(str(tmp_path / name), pad_token_id=3).config.pad_token_id is not None


SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24, "vocab_size": 20}


def test_positions_are_as_many_as_an_input_may_have_tokens() -> None:
    from transformers import (
        BertConfig,
        BertModel,
        DebertaV2Config,
        DebertaV2Model,
        GPT2Config,
        GPT2Model,
        OPTConfig,
        OPTModel,
        RobertaConfig,
        RobertaModel,
    )

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    opt = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": 20}
    models = (
        (BertModel(BertConfig(**SHAPE, max_position_embeddings=12)), 12),
        (RobertaModel(RobertaConfig(**SHAPE, max_position_embeddings=12, pad_token_id=1)), 10),
        (GPT2Model(GPT2Config(**sizes, n_positions=12)), 12),
        (OPTModel(OPTConfig(**opt, word_embed_proj_dim=16, max_position_embeddings=12)), 12),
    )
    for model, expected in models:
        assert positions_of(model) == expected
        model(input_ids=torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))
    relative = DebertaV2Model(
        DebertaV2Config(**SHAPE, max_position_embeddings=12, position_biased_input=False, relative_attention=True)
    )
    assert positions_of(relative) is None
    relative(input_ids=torch.full((1, 20), 5))


def test_encoders_are_known_by_their_configuration() -> None:
    from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

    with pytest.raises(DataError, match="name: expected a decoder, found BertLMHeadModel, which sees the tokens"):
        require_causal_kind("name", BertLMHeadModel(BertConfig(**SHAPE)))
    require_causal_kind("name", BertLMHeadModel(BertConfig(**SHAPE, is_decoder=True)))
    require_causal_kind("name", MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2)))
