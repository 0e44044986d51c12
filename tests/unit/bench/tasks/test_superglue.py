import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as reference

from rgft.bench.tasks import bench_task, glue_metrics, superglue
from rgft.bench.tasks.labelled import Answered
from rgft.config import Config
from rgft.errors import ConfigError, DataError
from rgft.evaluation import evaluate
from rgft.run import Run, Settings
from tests.unit.tasks.conftest import model_folder  # noqa: F401


def test_metrics_are_the_usual_ones() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 2), torch.randint(0, 2, (60,))
    predicted = logits.argmax(-1)
    assert glue_metrics.binary(Answered.one_by_one(logits, labels))["f1"] == pytest.approx(
        reference.f1_score(labels, predicted)
    )
    assert glue_metrics.classes(Answered.one_by_one(logits, labels))["f1"] == pytest.approx(
        reference.f1_score(labels, predicted, average="macro")
    )
    values, targets = torch.randn(60, 1), torch.randint(0, 6, (60,)).float()  # with ties
    found = glue_metrics.numbers(Answered.one_by_one(values, targets))
    assert found["spearman"] == pytest.approx(spearmanr(values.view(-1), targets).statistic)
    constant = glue_metrics.numbers(Answered.one_by_one(torch.ones(60), targets))
    assert "spearman" not in constant
    assert "pearson" not in constant


def test_groups_are_scored_together() -> None:
    #              question 0, both right   question 1, one wrong      question 2: the right one is likelier, both "no"
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [2.0, 1.0]])
    labels, groups = torch.tensor([1, 0, 1, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    worths = torch.tensor([1.0, 0.5, 1.0, 0.25, 0.0, 1.0])
    split = Answered(logits=logits, labels=labels, groups=groups, worths=worths)
    chosen = glue_metrics.choices(split)
    assert chosen["accuracy"] == pytest.approx(2 / 3)
    assert chosen["row_accuracy"] == pytest.approx(4 / 6)
    told = glue_metrics.answers(split)
    assert told["exact"] == pytest.approx(1 / 3)
    assert told["f1"] == pytest.approx(reference.f1_score(labels, logits.argmax(-1)))
    named = glue_metrics.named(split)
    assert named["exact"] == pytest.approx(2 / 3)
    assert named["f1"] == pytest.approx((1.0 + 0.25 + 1.0) / 3)
    assert named["accuracy"] == chosen["row_accuracy"]


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("The U.S. Congress", ["us congress"], 1.0),
        ("Angela Merkel", ["Berlin", "Chancellor Angela Merkel"], 0.8),
        ("Paris", ["Berlin"], 0.0),
        ("New New York", ["New York"], 0.8),  # a word counts as often as it is there
        ("the", ["a"], 1.0),
        ("the", ["Berlin"], 0.0),
    ],
)
def test_overlap_of_answers_is_that_of_squad(answer: str, expected: list[str], value: float) -> None:
    assert glue_metrics.overlap(answer, expected) == pytest.approx(value)


def saved(folder: Path, **splits: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def copa(number: int) -> dict[str, Any]:
    return {
        "premise": f"the film was {number}", "question": "cause", "choice1": f"good {number}",
        "choice2": f"bad {number}", "label": number % 2,
    }  # fmt: skip


def test_a_question_s_rows_stay_together(tmp_path: Path, model_folder: Path) -> None:  # noqa: F811
    data = saved(tmp_path / "copa", train=[copa(n) for n in range(40)], validation=[copa(n) for n in range(38, 48)])
    splits = superglue._splits("copa", superglue.SOURCES["copa"], data, 0.2)
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    # Premises 38 and 39 are in both files, and only tested on.
    assert len(splits["test"]) == 20
    assert sum(len(rows) for rows in splits.values()) == 96
    assert len(groups["test"]) == 10
    assert not groups["test"] & groups["train"]
    assert not groups["validation"] & (groups["train"] | groups["test"])
    assert all(sum(row.group == group for row in splits["train"]) == 2 for group in groups["train"])
    settings = {"name": "superglue", "task": "copa", "data": data, "model": str(model_folder), "train_size": 32}
    task = bench_task(settings, seed=0)
    assert task.test is not None
    assert set(evaluate(task, task.test, batch_size=8, loss=task.loss)) == {"loss", "accuracy", "row_accuracy"}
    run = Run(task, Config.from_dict({"budget": 0.5, "seed": 0}), Settings(lr=1e-3, epochs=2.0, batch_size=8))
    try:
        run.train()
        assert run.guide.step_count > 0
    finally:
        run.close()


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "passage": f"Ada Lovelace, {number}, met Charles Babbage.\n@highlight\nLovelace wrote", "idx": number,
        "query": f"In {number} @placeholder wrote a program",
        "entities": ["Charles Babbage", "Ada Lovelace", "the Ada Lovelace", "Lovelace"], "answers": ["Ada Lovelace"],
        **changes,
    }  # fmt: skip


def test_names_are_put_into_the_gap(tmp_path: Path, model_folder: Path) -> None:  # noqa: F811
    rows = superglue._labelled("record", superglue.SOURCES["record"], record(7), {})
    assert [(row.texts[1], row.label, row.worth, row.group) for row in rows] == [
        ("In 7 Charles Babbage wrote a program", 0.0, 0.0, 0),
        ("In 7 Ada Lovelace wrote a program", 1.0, 1.0, 0),  # once, however often it is there
        ("In 7 Lovelace wrote a program", 0.0, pytest.approx(2 / 3), 0),
    ]
    data = saved(
        tmp_path / "record", train=[record(n) for n in range(40)], validation=[record(n) for n in range(40, 50)]
    )
    settings = {"name": "superglue", "task": "record", "data": data, "model": str(model_folder), "train_size": 64}
    task = bench_task(settings, seed=0)
    assert task.test is not None
    assert len(task.test) == 30
    before = evaluate(task, task.test, batch_size=8, loss=task.loss)
    assert set(before) == {"loss", "f1", "exact", "accuracy"}
    run = Run(task, Config.from_dict({"budget": 1.0, "seed": 0}), Settings(lr=3e-3, epochs=10.0, batch_size=8))
    try:
        run.train()
        after = evaluate(task, task.test, batch_size=8, loss=task.loss)
    finally:
        run.close()
    assert after["loss"] < before["loss"]
    for changes, message in [({"answers": []}, "expected answers, found none"), ({"entities": []}, "found nothing in")]:
        with pytest.raises(DataError, match=message):
            superglue._labelled("record", superglue.SOURCES["record"], record(7, **changes), {})


@pytest.mark.parametrize("name", sorted(superglue.SOURCES))
def test_every_task_reads_the_hub_s_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    source, asked = superglue.SOURCES[name], []

    def load(hub: str, configuration: str, *, split: str) -> Dataset:
        asked.append((hub, configuration, split))
        start = 0 if split == "train" else 90
        rows = [
            {**{column: f"{column} {number}" for column in source.columns}, "idx": 0,
             "label": number % max(2, len(source.names)) if source.names else number / 7,
             **({"query": f"@placeholder {number}", "entities": ["Ada", "Bob"], "answers": ["Ada"]}
                if name == "record" else {})}
            for number in range(start, start + 100)
        ]  # fmt: skip
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load)
    splits = superglue._splits(name, source, None, 0.1)
    assert asked[0][2] == "train"
    assert asked[1][2] == source.test
    texts = {split: {row.texts for row in rows} for split, rows in splits.items()}
    assert len(texts["test"]) == (200 if name in ("copa", "record") else 100)
    assert not texts["test"] & (texts["train"] | texts["validation"])
    assert not texts["train"] & texts["validation"]


def test_what_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a task of GLUE or SuperGLUE, found 'colla'; nearest: cola"):
        bench_task({"name": "superglue", "task": "colla", "train_size": 1}, seed=0)
    row = {"sentence": "a", "label": -1}
    data = saved(tmp_path / "cola", train=[row], validation=[row])
    with pytest.raises(DataError, match="expected a label of 0 to 1, found -1; the test labels are not public"):
        bench_task({"name": "superglue", "task": "cola", "train_size": 1, "data": data}, seed=0)
    with pytest.raises(DataError, match=r"expected train\.parquet or train\.jsonl in it, found neither"):
        bench_task({"name": "superglue", "task": "cola", "train_size": 1, "data": str(tmp_path)}, seed=0)
