"""Finding images in folders named like their class, with or without folders for the splits above them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from rgft.errors import DataError
from rgft.tasks.images import LabelledImage

log = logging.getLogger("rgft")

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

#: Names that a split's folder may have.
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split: `root` itself where it holds classes, one inside it where it holds splits.

    A folder holds splits if one is named `train` and all are named like splits.

    Returns:
        None where `root` holds splits, but not this one.

    Raises:
        DataError: the split is there under two names.
    """
    found = {path.name: path for path in _folders(root)}
    names = {name for names in SPLIT_FOLDERS.values() for name in names}
    if "train" not in found or not found.keys() <= names:
        return root
    present = [name for name in SPLIT_FOLDERS[split] if name in found]
    if len(present) > 1:
        raise DataError(f"{root}: expected one folder for {split}, found {' and '.join(present)}; merge or rename them")
    return found[present[0]] if present else None


def holds_splits(root: Path) -> bool:
    """Whether the folder holds a folder per split, and not the classes themselves."""
    return split_folder(root, "train") != root


def read_folder(folder: Path) -> list[LabelledImage]:
    """All images below the class folders of a folder, sorted by path.

    Hidden files and folders are skipped; files of other kinds are too, and counted in the log.

    Raises:
        DataError: there are no class folders, images lie beside them, or a class has no image.
    """
    classes = _folders(folder)
    loose = sorted(path for path in _entries(folder) if path.is_file() and path.suffix.lower() in ENDINGS)
    if not classes:
        what = f"{len(loose)} images, but no folders" if loose else "neither folders nor images"
        raise DataError(f"{folder}: expected a folder per class with its images inside, found {what}")
    if loose:
        raise DataError(
            f"{folder}: expected images inside the class folders only, found {len(loose)} beside them, first "
            f"{loose[0].name}; move them into a class or remove them"
        )
    images: list[LabelledImage] = []
    others: Counter[str] = Counter()
    empty: list[str] = []
    for name in classes:
        paths = sorted(_files(name))
        mine = [path for path in paths if path.suffix.lower() in ENDINGS]
        others.update(path.suffix or path.name for path in paths if path.suffix.lower() not in ENDINGS)
        images += [LabelledImage(label=name.name, where=str(path), content=path.read_bytes) for path in mine]
        if not mine:
            empty.append(name.name)
    if empty:
        raise DataError(
            f"{folder}: expected images ({', '.join(ENDINGS)}) in every class folder, found none in "
            f"{', '.join(empty[:10])}{', …' if len(empty) > 10 else ''}; fill or remove {len(empty)} folder(s)"
        )
    if others:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(others.items()))
        log.warning("%s: %d files are no images and are skipped: %s", folder, sum(others.values()), kinds)
    return images


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error.strerror or error}") from error


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror or error}") from error

    found: list[Path] = []
    for inside, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in files if not name.startswith(".")]
    return found
