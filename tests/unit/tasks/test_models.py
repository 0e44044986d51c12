from pathlib import Path

import pytest
import torch

from rgft.errors import DataError
from rgft.tasks.models import load_causal_lm, load_classifier
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
