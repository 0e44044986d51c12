"""Reading result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rgft.bench.results import read_result
from rgft.errors import DataError


def read_results(folder: Path, schema: str, *, of: str) -> list[dict[str, Any]]:
    """The results of a schema below a folder, by path.

    Args:
        of: what makes them, for the message.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    found = [read_result(path, {"schema": str}) for path in sorted(folder.glob("**/*.json"))]
    results = [result for result in found if result["schema"] == schema]
    if not results:
        raise DataError(f"{folder}: expected results of the {of}, found none; run it first")
    return results
