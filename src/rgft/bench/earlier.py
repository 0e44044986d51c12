"""The run of RGFT that a method follows: read from a stored result, or made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rgft.bench.experiment import Cell, Contender, Experiment
from rgft.bench.fingerprint import require_equal
from rgft.bench.methods import method
from rgft.bench.results import read_result, unlike
from rgft.errors import ConfigError, DataError
from rgft.tasks.fingerprint import Data


def earlier_result(
    experiment: Experiment, cell: Cell, data: Data, run_cell: Callable[[Experiment, Cell], dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """RGFT's result at the cell's task, budget and seed.

    The contender's settings may name a file, `{"result": "…--seed{seed}.json"}`; else RGFT runs at the cell's learning
    rate with the settings `{"rgft": {…}}`, and is not tested.

    Args:
        experiment, cell: what follows.
        data: the cell's.
        run_cell: runs a cell.

    Raises:
        ConfigError: the learning rate is searched inside the run.
        DataError: the file is missing, damaged, of another run, or on other data.
    """
    contender, settings = cell.contender, cell.settings
    if settings.get("lr") is not None:
        raise ConfigError(
            f"{contender.label}: expected learning rates in lrs, found settings.lr: what RGFT did at a rate that is "
            "searched inside a run cannot be known before"
        )
    stored = settings.get("result")
    if stored is not None:
        return _read(Path(str(stored).format(seed=cell.seed)), experiment, cell, data)
    own = Contender(
        label=f"{contender.label}-rgft", method="rgft", budget=contender.budget, lrs=contender.lrs,
        settings=settings.get("rgft", {}),
    )  # fmt: skip
    return run_cell(experiment, replace(cell, contender=own, variant=None, is_final=False))


def _read(path: Path, experiment: Experiment, cell: Cell, data: Data) -> dict[str, Any]:
    try:
        result = read_result(path)
    except OSError as error:
        raise DataError(f"settings.result: expected a result of RGFT in {path}: {error}") from error
    expected: Mapping[str, Any] = {
        "method": "rgft", "task": dict(experiment.task), "run": dict(experiment.run), "seed": cell.seed,
        "budget": cell.contender.budget, "revision": method("rgft").revision, "common_config": dict(experiment.config),
    }  # fmt: skip
    wrong = [
        f"{path}: expected {key} {expected[key]!r}, found {value!r}" for key, value in unlike(result, expected).items()
    ]
    if "diverged" in result:
        wrong.append(f"{path}: expected a run that has ended, found one that diverged: {result['diverged']}")
    if wrong:
        raise DataError("settings.result is of another run:\n  " + "\n  ".join(wrong))
    if "data" in result:
        require_equal(result["data"], data, str(path), "the run that follows it")
    return result
