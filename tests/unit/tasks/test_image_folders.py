"""Which images a folder holds, and of which class and split."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgft.errors import DataError
from rgft.tasks.image_folders import holds_splits, read_folder, split_folder


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def found(folder: Path) -> list[tuple[str, str]]:
    return [(image.label, str(Path(image.where).relative_to(folder))) for image in read_folder(folder)]


def test_images_of_all_kinds_at_any_depth(tmp_path: Path) -> None:
    names = ["a/1.png", "a/deep/er/2.JPG", "b/3.jpeg", "b/4.webp", "b/5.bmp", "b/6.tif", "b/7.tiff"]
    assert found(touch(tmp_path, *names)) == [(name[0], name) for name in names]


def test_what_is_hidden_is_skipped_and_what_is_no_image_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a/1.png", "b/2.png", ".cache/3.png", "a/._1.png", "a/.x/4.png", ".hidden.png")
    assert found(tmp_path) == [("a", "a/1.png"), ("b", "b/2.png")]
    assert caplog.text == ""
    touch(tmp_path, "a/notes.txt", "b/c/notes.txt", "b/README", "about.md")
    assert found(tmp_path) == [("a", "a/1.png"), ("b", "b/2.png")]
    assert "3 files are no images and are skipped: 2 × .txt, 1 × README" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1.png", "b/notes.txt", "c/.4.png"], "in every class folder, found none in b, c; fill or remove 2"),
        (["a/1.png", "b/2.png", "3.png", "4.jpg"], "inside the class folders only, found 2 beside them, first 3.png"),
        (["3.png"], "a folder per class with its images inside, found 1 images, but no folders"),
        (["about.md"], "found neither folders nor images"),
    ],
)
def test_folders_that_say_no_class(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_folder(touch(tmp_path, *names))


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_folders_of_splits(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "train/a/1.png", f"{name}/a/1.png")
    assert holds_splits(tmp_path)
    assert split_folder(tmp_path, "train") == tmp_path / "train"
    assert split_folder(tmp_path, "validation") == tmp_path / name
    assert split_folder(tmp_path, "test") is None
    assert not holds_splits(tmp_path / name)
    assert split_folder(tmp_path / name, "validation") == tmp_path / name


def test_a_class_may_be_named_like_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.png", "car/2.png")
    assert not holds_splits(tmp_path)
    assert found(tmp_path) == [("car", "car/2.png"), ("train", "train/1.png")]


def test_a_split_under_two_names(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "val/a/1.png", "valid/a/1.png")
    with pytest.raises(DataError, match="expected one folder for validation, found val and valid"):
        split_folder(tmp_path, "validation")
