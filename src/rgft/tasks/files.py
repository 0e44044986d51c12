"""Reading rows: CSV, TSV, JSONL, parquet, texts, or a name on the hub. Columns are checked first."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rgft.errors import DataError

Row = dict[str, Any]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}

#: Characters of a field; the csv module's own limit of 131,072 is less than a book.
_FIELD_LIMIT = 2**31 - 1
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


def read_rows(source: str, columns: Sequence[str], *, split: str = "train") -> list[Row]:
    """The wanted columns of every row.

    Args:
        source: a file (`.csv`, `.tsv` with a header, `.jsonl`, `.parquet`; `.txt`: texts separated by blank lines) or
            the name of a data set on the hub.
        columns: wanted columns; of a `.txt` file one, whatever its name.
        split: of a hub data set; files have one.

    Raises:
        DataError: the file is missing, unreadable or of another kind, lacks a column (the nearest is named), or has no
            rows; or the hub cannot be reached.
    """
    path = Path(source)
    is_file = path.exists() or path.suffix in SUFFIXES
    if is_file:
        rows = _read_file(path, columns)
    else:
        rows = read_hub(source, columns, split, instead=f"the path of a file ending in {', '.join(SUFFIXES)}")
    if not rows:
        raise DataError(f"{source}: expected at least one row, found none")
    return rows


def _read_file(path: Path, columns: Sequence[str]) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'} there")
    try:
        if path.suffix in SUFFIXES and path.stat().st_size == 0:
            raise DataError(f"{path}: expected rows, found an empty file; check what wrote it")
        if path.suffix in _DELIMITERS:
            with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
                reader = csv.DictReader(file, delimiter=_DELIMITERS[path.suffix], strict=True)
                if not reader.fieldnames:
                    raise DataError(f"{path}: expected a header with the names of the columns, found an empty line")
                _require_separator(path, reader.fieldnames)
                require_columns(str(path), columns, reader.fieldnames)
                return [_picked(path, reader.line_num, row, columns) for row in reader]
        if path.suffix == ".jsonl":
            return _read_jsonl(path, columns)
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            require_columns(str(path), columns, parquet.read_schema(path).names)
            return parquet.read_table(path, columns=list(dict.fromkeys(columns))).to_pylist()
        if path.suffix == ".txt":
            return _read_texts(path, columns)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, found byte {error.object[error.start]:#x} at {error.start}; "
            "save the file as UTF-8"
        ) from error
    except (OSError, csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read: {error}") from error
    raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, found {path.suffix or 'no ending'!r}")


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_jsonl(path: Path, columns: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: expected JSON: {error}") from error
            if not isinstance(value, Mapping):
                raise DataError(f"{path}, line {number}: expected an object, found {type(value).__name__}")
            require_columns(f"{path}, line {number}", columns, value)
            rows.append({column: value[column] for column in columns})
    return rows


def _read_texts(path: Path, columns: Sequence[str]) -> list[Row]:
    if len(set(columns)) != 1:
        raise DataError(
            f"{path}: a .txt file holds texts alone, expected one column, found {', '.join(columns)}; give a .csv, "
            ".tsv, .jsonl or .parquet file"
        )
    paragraphs = re.split(r"\n[^\S\n]*\n", path.read_text(encoding="utf-8-sig"))
    return [{columns[0]: paragraph.strip("\n")} for paragraph in paragraphs if paragraph.strip()]


def read_hub(
    name: str, columns: Sequence[str], split: str, *, instead: str, configuration: str | None = None
) -> list[Row]:  # fmt: skip
    """Columns of a split on the hub; arguments as `hub_split`.

    Raises:
        DataError: it could not be loaded, or a column is missing.
    """
    data = hub_split(name, split, instead=instead, configuration=configuration)
    require_columns(name, columns, data.column_names)
    return [dict(row) for row in data.select_columns(list(dict.fromkeys(columns)))]


def hub_split(name: str, split: str, *, instead: str, configuration: str | None = None) -> Any:
    """A split of a data set on the hub (`datasets.Dataset`).

    Args:
        name, split: on the hub.
        instead: what may be given in the name's place, for messages.
        configuration: of the data set, where it has several.

    Raises:
        DataError: it could not be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub's client raises many kinds
        which = split if configuration is None else f"{configuration}, {split}"
        raise DataError(
            f"{name!r} ({which}) is not here, and could not be loaded from the hub ({type(error).__name__}: {error}). "
            f"Give {instead}, or check the name, the network and HF_HUB_OFFLINE"
        ) from error


def _require_separator(path: Path, names: Sequence[str]) -> None:
    """Raises DataError where the header is one name with another separator in it."""
    own = _DELIMITERS[path.suffix]
    other = next((sign for sign in ",;\t|" if sign != own and sign in names[0]), None)
    if len(names) == 1 and other is not None:
        raise DataError(
            f"{path}: expected columns separated by {own!r}, found the header {names[0]!r}: separate them so, or, "
            "separated by tabs, call the file .tsv"
        )


def require_columns(where: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Raises DataError naming every missing column and the nearest one that is there."""
    names = [str(name) for name in found]
    problems = []
    for column in dict.fromkeys(wanted):
        if column not in names:
            near = get_close_matches(column, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{where}: there is no column {column!r}{hint} (columns: {', '.join(names) or 'none'})")
    if problems:
        raise DataError("\n".join(problems))


def _picked(path: Path, number: int, row: Mapping[str | None, Any], columns: Sequence[str]) -> Row:
    if None in row or any(row[column] is None for column in columns):
        raise DataError(f"{path}, line {number}: expected as many fields as the header has, found another number")
    return {column: row[column] for column in columns}
