"""Images in tables: what `datasets` loads, from parquet files as the hub has them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from rgft.errors import DataError
from rgft.tasks.image_tables import read_table
from tests.unit.tasks.pictures import picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(0, number).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels: list[Any], *, names: list[str] | None = None, cells: list[Any] | None = None) -> str:
    """A parquet file with columns `img` and `fine`."""
    cells = [{"bytes": png(n), "path": None} for n in range(len(labels))] if cells is None else cells
    data = datasets.Dataset.from_dict({"img": cells, "fine": labels})
    if names is not None:
        data = data.cast_column("fine", datasets.ClassLabel(names=names))
    if cells and isinstance(cells[0], dict):
        data = data.cast_column("img", datasets.Image())
    data.to_parquet(path)
    return str(path)


def read(source: str, **columns: str) -> Any:
    return read_table(source, **{"image": "img", "label": "fine", "split": "train", **columns})


def test_integers_that_the_data_set_names(tmp_path: Path) -> None:
    images, names = read(write(tmp_path / "a.parquet", [2, 0, 2], names=["zebra", "ape", "cat"]))
    assert [image.label for image in images] == ["cat", "zebra", "cat"]
    assert names == ("zebra", "ape", "cat")
    for number, image in enumerate(images):
        assert (np.asarray(image.pixels()) == np.asarray(picture(0, number))).all()
    assert images[2].where.endswith("a.parquet (train), row 3")


def test_names_and_integers_without_names(tmp_path: Path) -> None:
    images, names = read(write(tmp_path / "a.parquet", ["x", "y"]))
    assert ([image.label for image in images], names) == (["x", "y"], ())
    assert [image.label for image in read(write(tmp_path / "b.parquet", [7, 3]))[0]] == ["7", "3"]


def test_bytes_and_paths_are_images_too(tmp_path: Path) -> None:
    picture(0, 5).save(tmp_path / "p.png")
    for name, cell in (("bytes", png(5)), ("path", str(tmp_path / "p.png"))):
        images, _ = read(write(tmp_path / f"{name}.parquet", ["x"], cells=[cell]))
        assert (np.asarray(images[0].pixels()) == np.asarray(picture(0, 5))).all()


def test_a_hub_name_is_loaded_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = datasets.Dataset.from_parquet(write(tmp_path / "a.parquet", ["x", "y"]))
    asked: list[tuple[str, str]] = []

    def load(name: str, configuration: None, *, split: str) -> Any:
        asked.append((name, split))
        return stored

    monkeypatch.setattr("datasets.load_dataset", load)
    images, _ = read("someone/animals", split="test")
    assert asked == [("someone/animals", "test")]
    assert images[0].where == "someone/animals (test), row 1"


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, -1], ["a", "b"], r"row 2: expected one of the classes 0 to 1 in column 'fine', found -1"),
        (["x", None], None, r"row 2: expected a class \(a name or an integer\) in column 'fine', found None"),
        (["x", ""], None, "row 2: expected a class"),
        ([0.5, 1.0], None, r"row 1: expected a class .* found 0\.5"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: list[Any], names: list[str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.parquet", labels, names=names))


def test_columns_that_are_missing_or_hold_no_images(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", ["x", "y"])
    with pytest.raises(DataError, match=r"(?s)no column 'image'; did you mean 'img'\?.*no column 'label'"):
        read(source, image="image", label="label")
    with pytest.raises(DataError, match=r"expected images in column 'img' .*, found .*int64"):
        read(write(tmp_path / "b.parquet", ["x", "y"], cells=[1, 2]))


def test_an_empty_cell_is_no_image(tmp_path: Path) -> None:
    images, _ = read(write(tmp_path / "a.parquet", ["x", "y"], cells=[{"bytes": png(0), "path": None}, None]))
    with pytest.raises(DataError, match="row 2: expected an image, found none that can be read: the cell is empty"):
        images[1].pixels()


def test_files_and_names_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="expected a file, found nothing there"):
        read(str(tmp_path / "no.parquet"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"torn\.parquet: cannot be read as parquet: .*Parquet"):
        read(str(tmp_path / "torn.parquet"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)is not here, and could not be loaded.*folders named like"):
        read("someone/animals")
