"""Finding images in tables: data sets on the hub, and parquet files as the hub has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rgft.errors import DataError
from rgft.tasks.files import hub_split, require_columns
from rgft.tasks.images import LabelledImage


def read_table(source: str, *, image: str, label: str, split: str) -> tuple[list[LabelledImage], tuple[str, ...]]:
    """All images of a table, in its order.

    Args:
        source: a `.parquet` file, or the name of a data set on the hub.
        image: column with images.
        label: column with classes: names or integers; for integers that the data set names, the names are used.
        split: of a hub data set; files have one.

    Returns:
        The images, and the names of the classes in the data set's own order (empty: it gives none).

    Raises:
        DataError: it cannot be loaded, a column is missing or of another kind, or a label is.
    """
    data = _load(source, split)
    require_columns(source, (image, label), data.column_names)
    if len(data) == 0:
        raise DataError(f"{source}: expected at least one image in the split {split!r}, found none")
    labels, names = _labels(source, data, label)
    cells = _encoded(source, data, image)
    return [
        LabelledImage(
            label=name, where=f"{source} ({split}), row {row}", content=partial(_content, cells, row - 1, image)
        )
        for row, name in enumerate(labels, start=1)
    ], names


def _load(source: str, split: str) -> Any:
    from datasets import Dataset

    path = Path(source).expanduser()
    if path.suffix == ".parquet":
        if not path.is_file():
            raise DataError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'} there")
        try:
            return Dataset.from_parquet(str(path))
        except Exception as error:  # the library wraps its readers' errors in its own
            raise DataError(f"{path}: cannot be read as parquet: {_first_cause(error)}") from error
    return hub_split(source, split, instead="a folder of images in folders named like their class")


def _labels(source: str, data: Any, column: str) -> tuple[list[str], tuple[str, ...]]:
    from datasets import ClassLabel

    feature = data.features[column]
    names: tuple[str, ...] = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    by_value: dict[Any, str] = dict(enumerate(names))
    labels: list[str] = []
    for row, value in enumerate(data[column][:], start=1):
        is_class = value in by_value if names else isinstance(value, (str, int)) and value != ""
        if not is_class:
            expected = f"one of the classes 0 to {len(names) - 1}" if names else "a class (a name or an integer)"
            raise DataError(f"{source}, row {row}: expected {expected} in column {column!r}, found {value!r}")
        labels.append(by_value.get(value, str(value)))
    return labels, names


def _encoded(source: str, data: Any, column: str) -> Any:
    from datasets import Image

    try:
        return data.select_columns([column]).cast_column(column, Image(decode=False))
    except Exception as error:  # arrow's own kinds, by what the column holds
        raise DataError(
            f"{source}: expected images in column {column!r} (encoded bytes or paths), found {data.features[column]}"
        ) from error


def _content(cells: Any, position: int, column: str) -> bytes:
    cell = cells[position][column]
    if cell is None:
        raise ValueError("the cell is empty")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
