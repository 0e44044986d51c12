from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD
from transformers import BertConfig, BertForSequenceClassification

from rgft.config import Config
from rgft.config.sections import LowRankConfig
from rgft.errors import AttachError
from rgft.guide import Guide
from rgft.integrations import RGFTCallback
from rgft.model_defaults import spelled_out
from rgft.partition import partition
from tests.decoders import wide_decoder as decoder


def classifier() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def adapted() -> nn.Module:
    return get_peft_model(decoder(), LoraConfig(r=4, target_modules=["q_proj"]))  # type: ignore[arg-type]


def chosen(model: nn.Module, config: Config) -> LowRankConfig | None:
    pairs = spelled_out(config.resolved(), model, partition(model)).update.low_rank
    assert pairs != "auto"
    return pairs


def test_layers_of_a_language_model_take_pairs_at_their_own_rate() -> None:
    assert chosen(decoder(), Config()) == LowRankConfig(rank=8, lr_multiplier=20.0)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (classifier, Config()),
        (adapted, Config()),
        (lambda: decoder(32), Config()),  # as large as the weights that they would stand for
        (decoder, Config(update={"low_rank": None})),
        (decoder, Config(policy={"name": "last_n", "layers": 1})),
        (decoder, Config(preset="full")),
        (decoder, Config(signal="delta", scaling="none")),
    ],
)
def test_dense_weights_otherwise(build: Callable[[], nn.Module], config: Config) -> None:
    assert chosen(build(), config) is None


def test_pairs_that_were_asked_for_stay_as_they_are() -> None:
    asked = LowRankConfig(rank=4, lr_multiplier=3.0, others="frozen")
    assert chosen(classifier(), Config(update={"low_rank": asked})) == asked
    policy = Config(policy={"name": "last_n", "layers": 1}, update={"low_rank": {"rank": 4, "lr_multiplier": 3.0}})
    assert chosen(decoder(), policy) == LowRankConfig(rank=4, lr_multiplier=3.0)
    assert chosen(decoder(), Config(update={"low_rank": {"lr_multiplier": 1.0}})) == LowRankConfig(lr_multiplier=1.0)
    assert chosen(decoder(), Config(update={"low_rank": {"rank": 4}})) == LowRankConfig(rank=4)


def test_a_guide_trains_by_what_was_chosen_and_leaves_a_plain_model() -> None:
    model = decoder()
    names = set(model.state_dict())
    guide = Guide(model, Config(budget=0.5))
    assert guide.config.update.pairs == LowRankConfig(rank=8)
    assert set(guide.plan.pairs) == {"model.layers.0", "model.layers.1"}
    rates = sorted({group["lr"] for group in guide.param_groups(lr=1e-3)})
    assert rates == pytest.approx([1e-3, 2e-2])
    guide.detach()
    assert set(model.state_dict()) == names


def test_a_callback_comes_too_late_for_pairs() -> None:
    assert RGFTCallback(budget=0.3).config.update.low_rank is None


@pytest.mark.parametrize("is_early", [True, False])
def test_an_optimizer_without_the_pairs_is_told_what_it_lacks(is_early: bool) -> None:
    model = decoder()
    weights = list(model.parameters())
    guide = Guide(model, Config(budget=0.5))
    groups = weights if is_early else weights[:1]
    expected = "the low-rank pairs of 2 components" if is_early else "parameters of 4 components"
    with pytest.raises(AttachError, match=f"the optimizer lacks {expected}") as refused:
        guide.set_optimizer(SGD(groups, lr=0.1))
    assert ("update.low_rank: null" in str(refused.value)) == is_early


@pytest.mark.parametrize(
    ("build", "mask", "exponent"),
    [
        (decoder, "budget", 1.6),
        (decoder, {"name": "budget", "spread": 0.2}, 1.6),
        (decoder, {"name": "budget", "bias_exponent": 1.5}, 1.5),
        (classifier, "budget", None),
        (classifier, {"name": "budget", "bias_exponent": 1.5}, 1.5),
    ],
)
def test_under_a_pre_trained_head_less_is_cut(
    build: Callable[[], nn.Module], mask: Any, exponent: float | None
) -> None:
    model = build()
    resolved = Config(mask=mask, update={"low_rank": None}).resolved()
    found = spelled_out(resolved, model, partition(model))
    assert found.mask is not None
    assert resolved.mask is not None
    readout = 0.0 if build is decoder else None
    assert found.mask.params == {**resolved.mask.params, "bias_exponent": exponent, "readout": readout}
    # A setting that is given stays.
    own = Config(mask={"name": "budget", "readout": 0.02}, update={"low_rank": None}).resolved()
    own_mask = spelled_out(own, model, partition(model)).mask
    assert own_mask is not None
    assert own_mask.params["readout"] == 0.02
    # Said once is said: what is stored of a run is what it is resumed with.
    assert spelled_out(found, model, partition(model)) == found


def test_other_masks_stay_as_they_are() -> None:
    model = decoder()
    config = Config(mask={"name": "random", "q": 0.5}, update={"low_rank": None}).resolved()
    assert spelled_out(config, model, partition(model)) == config
