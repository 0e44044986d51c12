"""Result files: read, written, and those of an experiment found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rgft.bench.experiment import Cell
from rgft.errors import DataError
from rgft.telemetry.atomic_write import write_bytes

#: What the result of a run has in any case, and of which kind.
OF_A_RUN: Mapping[str, Any] = {
    "contender": str, "method": str, "budget": (int, float), "lr": (int, float), "seed": int, "task": dict, "run": dict,
    "metrics": dict,
}  # fmt: skip

#: What tables need of a final run beside, if it did not diverge.
OF_A_FINAL_RUN: Mapping[str, Any] = {"ledger": dict, "steps": int}


def read_result(path: Path, keys: Mapping[str, Any] = OF_A_RUN) -> dict[str, Any]:
    """A stored result.

    Args:
        path: of its file.
        keys: that it has in any case → type of the value, or several.

    Raises:
        DataError: the file is damaged: no JSON, no object, or without one of the keys.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError(f"{result!r:.40} is no object of keys and values")
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    require(path, result, keys)
    return result


def read_results(
    folder: Path, schema: str, *, of: str, named: str = "*.json", keys: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:  # fmt: skip
    """The results of a schema below a folder, by path.

    Args:
        folder: in which they lie, however deep.
        schema: that they say they are of.
        of: what makes them, for the message.
        named: pattern of their file names; what has another name is not read.
        keys: that they have in any case; see `read_result`.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    found = {path: read_result(path, {"schema": str}) for path in sorted(folder.glob(f"**/{named}"))}
    results = {path: result for path, result in found.items() if result["schema"] == schema}
    for path, result in results.items():
        require(path, result, keys)
    if not results:
        raise DataError(f"{folder}: expected results of the {of}, found none; run it first")
    return list(results.values())


def require(path: Path, result: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Raises DataError where a result lacks one of the keys (see `read_result`)."""
    if wrong := [key for key, kind in keys.items() if not isinstance(result.get(key), kind)]:
        raise _damaged(path, f"without {', '.join(wrong)}, or with something else there")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: expected a result in JSON, found a damaged file ({why}); delete it, and run again what made it"
    )


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes aside, then renames: a result is whole or absent."""
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def unlike(result: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored result has otherwise than is wanted: key → found.

    Results from before these were kept have no `common_config`, which is not compared then, no `revision`, which was
    the first, and no `chosen_by`, which was the loss.
    """
    found = {"common_config": wanted["common_config"], "revision": 1, "chosen_by": "loss", **result}
    return {key: found.get(key) for key, value in wanted.items() if found.get(key) != value}


class Results:
    """The folder of an experiment's results, which is made where there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.file_name

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A finished result, or None; see `read_result`."""
        path = self.path(cell)
        return read_result(path) if path.exists() else None

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        write_result(self.path(cell), result)

    def finals(self, label: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """All final runs of a contender, whatever they were made with; see `read_result`."""
        for path in sorted(self.folder.glob(f"{label}--final--*.json")):
            yield path, read_result(path)


def set_aside(path: Path, result: Mapping[str, Any]) -> Path:
    """Keeps a final result that is out of date where no table counts it; gives its new path."""
    aside = path.with_name(path.name.replace("--final--", "--superseded--", 1))
    while aside.exists():
        aside = aside.with_stem(f"{aside.stem}--again")
    write_result(aside, {**result, "is_final": False})
    path.unlink()
    return aside
