import inspect
from itertools import combinations
from typing import Any

import pytest

from rgft.bench.group import Group, told_apart
from rgft.bench.tasks import TASKS, superglue
from rgft.errors import DataError


def group(name: str = "", *, method: str = "full", run: dict[str, Any] | None = None, **settings: Any) -> Group:
    named = {"name": name} if name else {}
    return Group.of({"task": {**named, "train_size": 8, **settings}, "run": {"epochs": 1.0, **(run or {})},
                     "method": method})  # fmt: skip


#: Settings that a task cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    "images": {"data": "flowers", "model": "x"}, "summarisation": {"model": "t5"}, "superglue": {"task": "rte"},
}  # fmt: skip


def test_tasks_of_one_kind_are_told_apart() -> None:
    assert group("language").title == "language modelling (python), 8 examples, one epoch"
    assert group("language", corpus="bbc").title == "language modelling (bbc), 8 examples, one epoch"
    short, shorter = (group("bbc", tokens=tokens) for tokens in (64, 32))
    assert short.title == "BBC news, 8 examples of 64 tokens, one epoch"
    assert short != shorter
    flowers = group("images", data="flowers", model="x", train_size=None)
    assert flowers.title == "images (flowers), x, all examples, one epoch"
    with pytest.raises(DataError, match="found 'sst3'"):
        group("sst3")


def test_runs_of_another_model_batch_size_or_test_set_are_another_comparison() -> None:
    plain = group("language")
    assert plain == group("language", model="smollm2", corpus="python")  # the defaults
    assert plain == group("language", run={"epochs": 1, "device": "cuda", "eval_batch_size": 8})
    others = [
        group("language", model="gpt2"), group("language", test_size=9), group("language", run={"batch_size": 8}),
        group("language", run={"weight_decay": 0.5}),
    ]  # fmt: skip
    assert len({plain, *others}) == 5
    assert others[0].title == "language modelling (python), gpt2, 8 examples, one epoch"
    titles = [told.title for told in told_apart([plain, *others]).values()]
    assert len(set(titles)) == 5
    assert titles[0].endswith("one epoch, batch_size 32, test_size 160, weight_decay 0.01")
    assert told_apart([plain, others[0]]) == {plain: plain, others[0]: others[0]}
    cut = group("language", method="cut")
    assert told_apart([plain, cut])[cut].title == plain.title  # its tables say that the cut is fixed


def test_the_metric_is_the_task_s_own_by_its_settings() -> None:
    for name, source in superglue.SOURCES.items():
        assert group("superglue", task=name).metric == source.primary
    assert group("superglue", task="stsb").metric == "pearson"
    assert group("cola").metric == "matthews"
    assert (group("code").metric, group("code", k=[5, 10]).metric) == ("pass@1", "pass@5")
    assert (group().metric, group("digits").metric, group("summarisation").metric) == ("accuracy", "accuracy", "rougeL")


def test_every_task_has_a_title_a_metric_and_a_corpus() -> None:
    for name, task in TASKS.items():
        found = group(name, **NEEDED.get(name, {}))
        assert found.title.startswith(task.title)
        assert found.metric
        assert found.corpora
        assert set(task.settings) == set(inspect.signature(task.prepare).parameters) - {"seed", "allow_code_execution"}


def test_tasks_on_one_corpus_are_dependent_and_no_others_are() -> None:
    together = [
        [group(), group("rotten_tomatoes"), group("sst2"), group("superglue", task="sst2")],
        [group("cola"), group("superglue", task="cola")],
        [group("superglue", task="rte"), group("superglue", task="super_rte")],
        [group("superglue", task="mnli"), group("superglue", task="mnli_mismatched")],
        [group("superglue", task="wnli"), group("superglue", task="wsc")],
        [group("mrpc"), group("superglue", task="mrpc"), group("superglue", task="stsb")],
        [group("bbc"), group("bbc", tokens=32), group("language", corpus="bbc"), group("instructions", data="topics")],
        [group("language"), group("language", model="gpt2"), group("code")],
        [group("images", data="a/mnist", model="x"), group("digits")],
        [group("summarisation", model="t5"), group("summarisation", model="t5", data="copy/xsum")],
        [group("language", corpus="./a/texts.txt"), group("language", corpus="b.txt", test="./a/texts.txt")],
        [group("instructions", data="arithmetic")], [group("newsgroups")], [group("imdb")],
        [group("superglue", task="qqp")], [group("superglue", task="qnli")],
    ]  # fmt: skip
    for same in together:
        assert all(one.corpora & other.corpora for one, other in combinations(same, 2))
    for one, other in combinations(together, 2):
        assert not any(a.corpora & b.corpora for a in one for b in other)
    # What was learnt from something else is tested on the same problems.
    assert group("code").corpora & group("code", data="own.jsonl").corpora == {"humaneval"}
