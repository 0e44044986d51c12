"""From sources of images to a task: splits, classes, variants, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rgft.batches import BatchStream
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.image_classification import Images, image_classification
from rgft.tasks.images import LabelledImage
from tests.unit.tasks.pictures import SIDE, picture, save_folder, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("images") / "vit")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "data", {"up": 10, "down": 20})


def prepared(model: Path, train: Path | str, **settings: Any) -> PreparedTask:
    return image_classification(model=str(model), train=str(train), **settings)


def labels_of(split: Any) -> list[int]:
    return [split[i]["labels"] for i in range(len(split))]


def test_the_fingerprint_reads_no_file_again(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train: Any = prepared(model, data, held_out=0.2).train
    last = train.subset([2, 3])
    without = Images(last._images, tuple(train._labels), train._processor, mirrors=True).fingerprint
    monkeypatch.setattr(LabelledImage, "content", property(lambda image: pytest.fail("read again")))
    assert last.fingerprint == without
    assert train.fingerprint != without


def test_a_folder_becomes_a_task(model: Path, data: Path) -> None:
    task = prepared(model, data, held_out=0.2)
    assert task.validation is not None
    assert task.test is None
    assert task.label_names == ("down", "up")
    assert [labels_of(split).count(1) for split in (task.train, task.validation)] == [8, 2]
    assert (len(task.train), len(task.validation)) == (24, 6)
    batch = task.collate([task.train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 3, SIDE, SIDE)
    task.model.eval()
    losses = task.loss(task.model, batch)
    assert losses.shape == (5,)
    assert torch.allclose(losses.mean(), task.model(**batch).loss)
    assert task.model.config.id2label == {0: "down", 1: "up"}
    assert task.model.config.label2id == {"down": 0, "up": 1}


def test_pixels_are_the_processors(model: Path, data: Path) -> None:
    """Written out: this processor scales to −1…1, and the picture has its size already."""
    task = prepared(model, data, flip=True)
    sides = {tuple(np.asarray(picture(kind, n)).ravel()): picture(kind, n) for kind, n in _all_pictures()}
    for place in range(len(task.train)):
        plain, mirrored = (task.train[place + v * len(task.train)]["pixel_values"] for v in (0, 1))
        pixels = ((plain + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        found = sides.pop(tuple(pixels.ravel()))
        expected = torch.tensor(np.asarray(found)[:, ::-1] / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)
        assert torch.allclose(mirrored, expected, atol=1e-6)
    with pytest.raises(IndexError):
        task.train[2 * len(task.train)]


def _all_pictures() -> list[tuple[int, int]]:
    return [(kind, n) for kind, count in ((0, 10), (1, 20)) for n in range(count)]


def test_mirroring_is_drawn_anew_each_epoch_and_for_training_only(model: Path, data: Path) -> None:
    task = prepared(model, data, flip=True, seed=1)
    count = len(task.train)
    stream = BatchStream(task.train, batch_size=4, collate_fn=task.collate, epochs=20, seed=1)
    orders = [stream.order(epoch) for epoch in range(20)]
    assert all(sorted(i % count for i in order) == list(range(count)) for order in orders)
    mirrored = [frozenset(i % count for i in order if i >= count) for order in orders]
    assert len(set(mirrored)) == 20
    assert 0.4 < sum(map(len, mirrored)) / (20 * count) < 0.6
    first = next(iter(stream))
    for example, pixels in zip(first.ids, first.batch["pixel_values"], strict=True):
        assert torch.equal(pixels, task.train[example]["pixel_values"])
    for split in (prepared(model, data, flip=False).train, task.validation):
        with pytest.raises(IndexError):
            split[len(split)]  # type: ignore[index,arg-type]


def test_equal_files_are_on_one_side_only_and_reported(
    model: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted((data / "up").iterdir())[:5]:
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    task = prepared(model, data, held_out=0.5)
    assert "5 of 35 training images are exact copies of others" in caplog.text
    sides = [{split[i]["pixel_values"].numpy().tobytes() for i in range(len(split))} for split in splits(task)]
    assert len(sides[0] | sides[1]) == 30
    assert not sides[0] & sides[1]


def splits(task: PreparedTask) -> tuple[Any, Any]:
    return task.train, task.validation


def test_folders_of_splits_are_found_unless_given(model: Path, tmp_path: Path, data: Path) -> None:
    root = tmp_path / "root"
    for number, (split, count) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        save_folder(root / split, {"up": count, "down": count}, first=100 * number)
    task = prepared(model, root)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [12, 6, 4]  # type: ignore[arg-type]
    task = prepared(model, root, validation=str(data))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [12, 30, 4]  # type: ignore[arg-type]
    task = prepared(model, data, test=str(root))
    assert (len(task.train), len(task.test)) == (27, 4)  # type: ignore[arg-type]
    shutil.rmtree(root / "test")
    with pytest.raises(DataError, match="expected a folder for test in it, as it holds splits; found none"):
        prepared(model, data, test=str(root))


def test_images_that_were_trained_on_are_reported(model: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared(model, data, test=str(data))
    assert "test: 30 of 30 images are training images too" in caplog.text


def test_classes_in_number_order(model: Path, tmp_path: Path) -> None:
    assert prepared(model, save_folder(tmp_path / "n", {"10": 6, "9": 6, "x": 6})).label_names == ("9", "10", "x")


def test_new_weights_depend_on_the_seed_alone(model: Path, tmp_path: Path) -> None:
    data = save_folder(tmp_path / "n", {"a": 6, "b": 6, "c": 6})
    before = torch.get_rng_state()
    tasks = [prepared(model, data, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (task.model.classifier.weight for task in tasks)
    assert first.shape[0] == 3
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_of_other_sizes_are_made_one_size(model: Path, data: Path) -> None:
    picture(0, 77, side=3).resize((3, 9)).save(data / "up" / "tall.png")
    picture(0, 78, side=40).convert("L").save(data / "up" / "grey.png")
    task = prepared(model, data)
    assert {tuple(task.train[i]["pixel_values"].shape) for i in range(len(task.train))} == {(3, SIDE, SIDE)}


def test_a_processor_that_keeps_sizes_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    picture(0, 77, side=40).save(data / "up" / "large.png")
    copied = shutil.copytree(model, tmp_path / "keeps")
    settings = json.loads((copied / "preprocessor_config.json").read_text()) | {"do_resize": False}
    (copied / "preprocessor_config.json").write_text(json.dumps(settings))
    task = prepared(copied, data, held_out=0.1)
    with pytest.raises(DataError, match=r"large\.png: expected .* one size, found 3 × 40 × 40 after 3 × 16 × 16"):
        _ = [split[i] for split in splits(task) for i in range(len(split))]


def test_models_that_cannot_be_used(model: Path, data: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "other")
    settings = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"height": 24, "width": 24}}))
    with pytest.raises(DataError, match=r"does not take what its image processor makes \(1 × 3 × 24 × 24 from"):
        prepared(copied, data)
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match=r"(?s)the image processor cannot be loaded.*save that of its kind beside it"):
        prepared(copied, data)
    with pytest.raises(DataError, match="expected a folder with a saved model"):
        prepared(tmp_path / "nowhere", data)


def test_a_single_image_that_batch_norm_cannot_take(data: Path, tmp_path: Path) -> None:
    task = prepared(save_model(tmp_path / "resnet", "resnet"), data)
    batches = [task.collate([task.train[i] for i in range(count)]) for count in (2, 1)]
    task.model.train()
    assert task.loss(task.model, batches[0]).shape == (2,)
    with pytest.raises(DataError, match="a batch of one image cannot be trained on"):
        task.loss(task.model, batches[1])
    task.model.eval()
    assert task.loss(task.model, batches[1]).shape == (1,)


def test_broken_images_are_named_before_anything_is_loaded(tmp_path: Path, data: Path) -> None:
    for name in ("up/000.png", "down/003.png"):
        (data / name).write_bytes((data / name).read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        prepared(tmp_path / "no model", data)
    assert "2 of 30 images cannot be read" in str(caught.value)
    assert all(str(data / name) in str(caught.value) for name in ("up/000.png", "down/003.png"))


def test_classes_that_training_does_not_have(model: Path, data: Path, tmp_path: Path) -> None:
    other = save_folder(tmp_path / "other", {"up": 2, "aside": 2})
    with pytest.raises(DataError, match=r"test: expected classes of the training images, found 1 others: aside \("):
        prepared(model, data, test=str(other))
    with pytest.raises(DataError, match=r"expected at least two classes, found \['only'\]"):
        prepared(model, save_folder(tmp_path / "one", {"only": 3}))


def test_holding_out_must_leave_every_class(model: Path, tmp_path: Path) -> None:
    data = save_folder(tmp_path / "few", {"many": 12, "few": 1})
    assert prepared(model, data, held_out=0.2).label_names == ("few", "many")
    with pytest.raises(DataError, match="held_out: 70% leaves no training image of few"):
        prepared(model, data, held_out=0.7)


def test_sources_that_are_none(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"a\.csv: expected a folder .*, found a file ending in '\.csv' there"):
        prepared(model, tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"nowhere: expected a folder .*, found nothing there"):
        prepared(model, tmp_path / "nowhere")
    with pytest.raises(DataError, match="found 'img' and 'label' with the folder"):
        prepared(model, data, image="img")


def test_a_table_beside_a_folder(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_dict(
        {"img": [str(data / "up" / f"00{n % 5}.png") for n in range(10)], "label": [1, 0, 0, 1, 1] * 2}
    )
    table = table.cast_column("label", datasets.ClassLabel(names=["up", "down"]))
    table.to_parquet(tmp_path / "t.parquet")
    task = prepared(model, tmp_path / "t.parquet", image="img", test=str(data), held_out=0.4, flip=False)
    assert task.label_names == ("up", "down")
    assert (len(task.train), len(task.validation)) == (6, 4)  # type: ignore[arg-type]
    assert labels_of(task.test).count(0) == 10
