import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft.errors import DataError
from rgft.tasks.text_classification import text_classification

TEXTS = ["good film", "a very bad film", "the film was not bad", "not good , a bad film ."]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def labelled(path: Path, labels: tuple[Any, ...] = ("no", "yes"), repeats: int = 10) -> str:
    rows = [
        {"text": f"{t} {'. ' * i}", "label": labels[j % len(labels)]}
        for i in range(repeats)
        for j, t in enumerate(TEXTS)
    ]
    return write(path, rows)


def test_a_csv_becomes_a_task(tmp_path: Path, model_folder: Path) -> None:
    task = text_classification(model=str(model_folder), train=labelled(tmp_path / "a.csv"), held_out=0.25)
    assert task.validation is not None
    assert (len(task.train), len(task.validation), task.label_names) == (30, 10, ("no", "yes"))
    batch = task.collate([task.train[i] for i in range(5)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    task.model.eval()
    losses = task.loss(task.model, batch)
    assert losses.shape == (5,)
    assert torch.allclose(losses.mean(), task.model(**batch).loss)
    assert task.model.config.id2label == {0: "no", 1: "yes"}


def test_the_same_text_is_on_one_side_only(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(TEXTS)] * 10
    task = text_classification(model=str(model_folder), train=write(tmp_path / "a.csv", rows), held_out=0.5)
    assert task.validation is not None
    sides = [
        {tuple(e["input_ids"]) for e in (split[i] for i in range(len(split)))}
        for split in (task.train, task.validation)
    ]
    assert not sides[0] & sides[1]


def test_integer_labels_keep_their_order(tmp_path: Path, model_folder: Path) -> None:
    task = text_classification(model=str(model_folder), train=labelled(tmp_path / "a.csv", (10, 9, 2)))
    assert task.label_names == ("2", "9", "10")


def test_pairs_and_regression(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"a": "good film", "b": "bad film", "score": i / 10} for i in range(20)]
    task = text_classification(
        model=str(model_folder), train=write(tmp_path / "a.csv", rows), text=("a", "b"), label="score", regression=True,
        validation=write(tmp_path / "v.csv", rows[:4]),
    )  # fmt: skip
    batch = task.collate([task.train[i] for i in range(4)])
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    task.model.eval()
    assert torch.allclose(task.loss(task.model, batch).mean(), task.model(**batch).loss)


def test_long_texts_are_cut_and_counted(tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = text_classification(model=str(model_folder), train=labelled(tmp_path / "a.csv"), max_length=6)
    assert max(len(task.train[i]["input_ids"]) for i in range(len(task.train))) == 6
    assert "are longer than 6 tokens and are cut" in caplog.text


def test_texts_longer_than_the_model_takes(tmp_path: Path, model_folder: Path) -> None:
    path = labelled(tmp_path / "a.csv", repeats=40)
    with pytest.raises(
        DataError, match=r"max_length: the model has 32 positions, found an example of .* --max-length 32"
    ):
        text_classification(model=str(model_folder), train=path, max_length=500)
    text_classification(model=str(model_folder), train=path, max_length=32)


def test_new_weights_depend_on_the_seed_alone(tmp_path: Path, model_folder: Path) -> None:
    path = labelled(tmp_path / "a.csv", ("a", "b", "c"))
    weights = [
        text_classification(model=str(model_folder), train=path, seed=seed).model.classifier.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bad_input(tmp_path: Path, model_folder: Path) -> None:
    path, model = labelled(tmp_path / "a.csv"), str(model_folder)
    unseen = write(tmp_path / "v.csv", [{"text": "good", "label": "maybe"}])
    with pytest.raises(DataError, match=r"row 1: the label 'maybe' does not occur .*\(its labels: no, yes\)"):
        text_classification(model=model, train=path, validation=unseen)
    with pytest.raises(DataError, match="at least two classes"):
        text_classification(model=model, train=labelled(tmp_path / "one.csv", ("x",)))
    with pytest.raises(DataError, match="row 2: expected a text in column 'text'"):
        text_classification(
            model=model, train=write(tmp_path / "e.csv", [{"text": "a", "label": 1}, {"text": " ", "label": 0}])
        )
    with pytest.raises(DataError, match="row 1: expected a number"):
        text_classification(model=model, train=path, regression=True)
    with pytest.raises(DataError, match=r"expected a folder with a saved model .* found nothing"):
        text_classification(model=str(tmp_path / "no-model"), train=path)
    with pytest.raises(DataError, match="one or two columns"):
        text_classification(model=model, train=path, text=())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a", "label": 0}\n{"text": "the", "label": NaN}',
            "row 2: expected a label, found nan, which stands",
        ),
        ('{"text": "a", "label": [0]}\n{"text": "the", "label": 1}', r"row 1: expected a label .*, found \[0\]"),
        ('{"text": "a", "label": 0}\n{"text": "the", "label": {"a": 1}}', "row 2: expected a label .*, found {'a': 1}"),
        ('{"text": "a", "label": 0}\n{"text": "the", "label": " "}', "row 2: expected a label .*, found ' '"),
        ("text,label\na,good\nthe,NaN\n", "row 2: expected a label, found 'NaN'.*; .* as 'not-a-number'"),
    ],
)
def test_labels_that_name_no_class(tmp_path: Path, model_folder: Path, content: str, message: str) -> None:
    bad = tmp_path / ("bad.jsonl" if content.startswith("{") else "bad.csv")
    bad.write_text(content)
    with pytest.raises(DataError, match=message):
        text_classification(model=str(model_folder), train=str(bad))
    with pytest.raises(DataError, match=message):
        text_classification(
            model=str(model_folder), train=labelled(tmp_path / "a.csv", ("good", 0, 1)), validation=str(bad)
        )


def test_columns_that_are_given_twice(tmp_path: Path, model_folder: Path) -> None:
    settings = {"model": str(model_folder), "train": labelled(tmp_path / "a.csv")}
    with pytest.raises(DataError, match="text: expected two different columns, found 'text' twice"):
        text_classification(**settings, text=("text", "text"))
    for text in (("label",), ("text", "label")):
        with pytest.raises(DataError, match="label: expected another column than the texts', found 'label' for both"):
            text_classification(**settings, text=text)
