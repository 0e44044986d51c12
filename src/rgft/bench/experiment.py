"""An experiment: tasks, methods with their grids, and seeds. Its result is a folder with one JSON file per run.

Learning rates are chosen on validation data with seeds of their own; test data is looked at by final runs only,
once each. Runs that are done are skipped, so that an experiment can be stopped and started again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rgft.bench.measures import Extra
from rgft.bench.methods import method
from rgft.bench.settings_file import read_settings
from rgft.errors import ConfigError, DataError
from rgft.telemetry.atomic_write import write_bytes


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method at one budget, with the learning rates it may choose from.

    Attributes:
        label: its row in tables.
        method: name in `methods.METHODS`.
        budget: share of full fine-tuning's FLOPs.
        lrs: grid of learning rates.
        settings: of the method.
        seeds: seeds of the final runs; None: the experiment's.
    """

    label: str
    method: str
    budget: float
    lrs: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a contender at one learning rate with one seed."""

    contender: Contender
    lr: float
    seed: int
    is_final: bool

    @property
    def file_name(self) -> str:
        kind = "final" if self.is_final else "tuning"
        return f"{self.contender.label}--{kind}--lr{self.lr:g}--seed{self.seed}.json"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared.

    Attributes:
        name: of the result folder.
        task: settings of the task (see `tasks.demo`).
        run: settings of every run (`rgft.run.Settings`), without the learning rate.
        config: RGFT settings that all contenders share.
        contenders: what is compared.
        tuning_seeds, seeds: disjoint.
        evaluate: what is evaluated of final runs beside their test split (see `measures.Extra`): time, no budget.
    """

    name: str
    task: Mapping[str, Any]
    run: Mapping[str, Any]
    config: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    evaluate: Extra = field(default_factory=Extra)

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Reads an experiment file.

        Its contenders may be the name of a file beside it, which several experiments share; with `budgets` each of
        them is there at each of these, as "label-budget".

        Raises:
            ConfigError: the file cannot be used; all problems at once.
        """
        known = sorted({*cls.__dataclass_fields__, "budgets"})
        data = read_settings(path, "an experiment", known=known, needed=set(known) - {"evaluate", "budgets"})
        if set(data["tuning_seeds"]) & set(data["seeds"]):
            raise ConfigError(f"{path}: tuning_seeds and seeds must be disjoint")
        contenders = _contenders(path, data["contenders"], data.pop("budgets", None))
        if not data["tuning_seeds"] and any(len(contender.lrs) > 1 for contender in contenders):
            raise ConfigError(
                f"{path}: expected tuning_seeds, since contenders have several learning rates; found none"
            )
        for contender in contenders:
            method(contender.method)
        extra = Extra.from_dict(data.get("evaluate", {}))
        extra.check(
            task=data["task"].get("name", "rotten_tomatoes"),
            searches_rate=any(c.settings.get("lr") not in (None, "auto") for c in contenders),
        )
        return cls(
            **{
                **data, "contenders": contenders, "tuning_seeds": tuple(data["tuning_seeds"]),
                "seeds": tuple(data["seeds"]), "evaluate": extra,
            }
        )  # fmt: skip

    def tuning_cells(self, contender: Contender) -> Iterator[Cell]:
        """The runs that its learning rate is chosen by; none where there is nothing to choose."""
        if len(contender.lrs) > 1:
            for lr in contender.lrs:
                for seed in self.tuning_seeds:
                    yield Cell(contender=contender, lr=lr, seed=seed, is_final=False)

    def final_cells(self, contender: Contender, lr: float) -> Iterator[Cell]:
        """Its final runs, at the learning rate that was chosen."""
        for seed in self.seeds if contender.seeds is None else contender.seeds:
            yield Cell(contender=contender, lr=lr, seed=seed, is_final=True)

    def all_cells(self) -> Iterator[Cell]:
        """Every run that may have a result: final ones at each learning rate, whichever is chosen."""
        for contender in self.contenders:
            yield from self.tuning_cells(contender)
            for lr in contender.lrs:
                yield from self.final_cells(contender, lr)


def _contenders(path: Path, given: Any, budgets: list[float] | None) -> tuple[Contender, ...]:
    """The contenders of an experiment file, budget by budget where it has budgets."""
    if isinstance(given, str):
        path = path.parent / given
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: expected a list of contenders in JSON: {error}") from error
    if not _is_list(given, dict):
        raise ConfigError(f"{path}: expected a list of contenders, found {given!r:.60}")
    if budgets is not None and not _is_list(budgets, (int, float)):
        raise ConfigError(f"{path}: expected budgets to be a list of numbers, found {budgets!r:.60}")
    fields = Contender.__dataclass_fields__
    needed = {"label", "method", "lrs"} | ({"budget"} if budgets is None else set())
    problems: list[str] = []
    for place, item in enumerate(given):
        label = item.get("label", f"contender {place + 1}")
        problems += [f"{path}: {label}: unknown key {key!r}" for key in sorted(set(item) - set(fields))]
        problems += [f"{path}: {label}: the key {key!r} is missing" for key in sorted(needed - set(item))]
        if not _is_list(item.get("lrs", [1.0]), (int, float)):
            problems.append(f"{path}: {label}: expected lrs to be a list of numbers, found {item['lrs']!r:.60}")
        if budgets is not None and "budget" in item:
            problems.append(f"{path}: {label}: expected no budget beside the experiment's budgets")
    if problems:
        raise ConfigError(problems)
    spread = given if budgets is None else [
        {**item, "label": f"{item['label']}-{budget:g}", "budget": budget} for budget in budgets for item in given
    ]  # fmt: skip
    contenders = tuple(
        Contender(
            **{
                **item, "lrs": tuple(item["lrs"]),
                "seeds": tuple(item["seeds"]) if item.get("seeds") is not None else None,
            }
        )
        for item in spread
    )  # fmt: skip
    labels = [contender.label for contender in contenders]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"{path}: expected labels of their own, found {', '.join(twice)} more than once")
    return contenders


def _is_list(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kinds) for item in value)


class Results:
    """The result files of an experiment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.file_name

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A finished result, or None.

        Raises:
            DataError: the file is damaged.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: expected a result in JSON, found a damaged file; delete it") from error

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Writes aside, then renames: a result is whole or absent."""
        text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
        write_bytes(self.path(cell), (text + "\n").encode())

    def best_lr(self, experiment: Experiment, contender: Contender) -> float | None:
        """The learning rate with the lowest mean validation loss over the tuning seeds.

        None while runs are missing, and where one diverged at each of the rates.
        """
        if len(contender.lrs) == 1:
            return contender.lrs[0]
        losses: dict[float, list[float]] = {lr: [] for lr in contender.lrs}
        for cell in experiment.tuning_cells(contender):
            result = self.read(cell)
            if result is None:
                return None
            losses[cell.lr].append(result["metrics"].get("validation", {}).get("loss", float("inf")))
        means = {lr: mean(found) for lr, found in losses.items()}
        best = min(means, key=lambda lr: means[lr])
        return best if means[best] < float("inf") else None
