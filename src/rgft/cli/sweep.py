"""`rgft sweep`: the same run under several settings, on one activation cache; the best by validation loss is kept.

Optuna proposes the settings and remembers the trials. A trial is a run folder like any other. Where layers are frozen
from the first step on, their activations are computed by the first trial and read by all others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgft.cli.failures import Interrupted
from rgft.cli.request import Request, read_request
from rgft.cli.train import finished, run_training
from rgft.errors import ConfigError
from rgft.telemetry.atomic_write import write_bytes
from rgft.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution
    from rich.console import Console

RESULT, STUDY, CACHE = "sweep.json", "study.log", "activations"
SCHEMA = "rgft.sweep/1"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One setting that is searched: a choice, or a range of numbers.

    Attributes:
        key: of the setting, as `--set` takes it.
        choices: values as written; empty for a range.
        low, high: ends of a range. Positive ends a factor of ten or more apart are searched on a logarithmic scale.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Dimension:
        """Reads `KEY=A,B,C` or `KEY=LOW:HIGH`.

        Raises:
            ConfigError: it is neither.
        """
        key, _, values = (part.strip() for part in text.partition("="))
        problem = ConfigError(f"--search: expected KEY=A,B,… or KEY=LOW:HIGH, found {text!r}")
        if not key or not values:
            raise problem
        if ":" not in values:
            choices = tuple(value.strip() for value in values.split(","))
            if len(set(choices)) < len(choices) or "" in choices:
                raise problem
            return cls(key=key, choices=choices)
        try:
            low, high = (float(end) for end in values.split(":"))
        except ValueError:
            raise problem from None
        if not low < high:
            raise ConfigError(f"--search: {key}: expected LOW < HIGH, found {low:g}:{high:g}")
        return cls(key=key, low=low, high=high)

    @property
    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        return FloatDistribution(self.low, self.high, log=self.low > 0.0 and self.high >= 10.0 * self.low)


def sweep(
    *, file: Path | None, overrides: Sequence[str], flags: Mapping[str, Any], rgft_flags: Mapping[str, Any],
    dimensions: Sequence[Dimension], trials: int | None, output: Path, resume: bool, console: Console, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """Runs the trials that are missing; returns all of them and the best, fit for JSON.

    Args:
        file, overrides, flags, rgft_flags: as `read_request` takes them; what is searched goes over them.
        dimensions: what is searched.
        trials: how many in all; None: every combination of choices.
        output: folder of the sweep.
        resume: go on with the sweep in the folder.

    Raises:
        RGFTError: anything given is wrong (before any trial), or a trial failed.
    """
    _check(dimensions, output, resume=resume)
    count = _number(dimensions, trials)

    def request(values: Mapping[str, Any]) -> Request:
        searched = [f"{key}={value}" for key, value in values.items()]
        return read_request(
            file=file, overrides=[*overrides, *_cache(output, given), *searched], flags=flags, rgft_flags=rgft_flags
        )

    given: Request | None = None
    given = request({})
    if given.settings.test is not None:
        raise ConfigError("test: a sweep chooses on validation data; found test data, which none of its trials may see")
    for dimension in dimensions:  # whatever is refused is refused before the first trial
        for value in dimension.choices or (dimension.low, dimension.high):
            request({dimension.key: value})
    output.mkdir(parents=True, exist_ok=True)
    study = _study(output, given.settings.seed)
    if trials is None and not resume:
        for values in product(*(dimension.choices for dimension in dimensions)):
            study.enqueue_trial(dict(zip((dimension.key for dimension in dimensions), values, strict=True)))
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and trial.values]
    results = [_stored(output, trial.number, trial.params) for trial in done]
    for left in [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]:
        study.enqueue_trial(left.params)
        study.tell(left.number, state=_failed())
    while len(results) < count:
        trial = study.ask({dimension.key: dimension.distribution for dimension in dimensions})
        results.append(_run(trial, request(trial.params), output, console=console, quiet=quiet))
        study.tell(trial, results[-1]["loss"])
        _keep_the_best_model(results)
        _write(output, results)
    return _write(output, results)


def _check(dimensions: Sequence[Dimension], output: Path, *, resume: bool) -> None:
    keys = [dimension.key for dimension in dimensions]
    if not keys or len(set(keys)) < len(keys):
        raise ConfigError(f"--search: expected each setting to search once, found {', '.join(keys) or 'none'}")
    if resume != (output / STUDY).exists():
        raise ConfigError(
            f"--resume: {output} has no sweep to go on with" if resume else
            f"--output: {output} has a sweep already; go on with it (--resume), or give another folder"
        )  # fmt: skip
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError("a sweep needs the package optuna: pip install 'rgft[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _number(dimensions: Sequence[Dimension], trials: int | None) -> int:
    combinations = prod(len(dimension.choices) for dimension in dimensions)
    if trials is None and not combinations:
        raise ConfigError("--trials: expected a number of trials, as ranges are searched; found none")
    return trials or combinations


def _cache(output: Path, given: Request | None) -> list[str]:
    """One cache on disk for all trials, where the user wants none of another kind."""
    if given is None or given.config.preset == "full" or given.config.execution.cache != "auto":
        return []
    return ["execution.cache=disk", f"execution.cache_dir={output / CACHE}"]


def _study(output: Path, seed: int) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(output / STUDY))), sampler=optuna.samplers.TPESampler(seed=seed),
        study_name="sweep", load_if_exists=True, direction="minimize",
    )  # fmt: skip


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def _folder(output: Path, number: int) -> Path:
    return output / f"trial-{number:03d}"


def _run(trial: Trial, request: Request, output: Path, *, console: Console, quiet: bool) -> dict[str, Any]:
    folder = _folder(output, trial.number)
    try:
        report = run_training(request, folder, resume=False, overwrite=True, console=console, quiet=quiet)
    except Interrupted as error:
        raise Interrupted(f"in trial {trial.number}; go on with the same command and --resume", error.number) from error
    return _result(trial.number, trial.params, report)


def _stored(output: Path, number: int, params: Mapping[str, Any]) -> dict[str, Any]:
    report = finished(RunFolder(_folder(output, number)))
    if report is None:
        raise ConfigError(f"--resume: {_folder(output, number)} was changed since its trial ended; start a new sweep")
    return _result(number, params, report)


def _result(number: int, params: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    metrics = report["metrics"]["validation"]
    return {
        "trial": number, "searched": dict(params), "loss": metrics["loss"], "metrics": metrics,
        "output": report["output"], "model": report["model"], "flops": report["flops"]["spent"],
        "fraction_of_full": report["flops"]["fraction_of_full"], "seconds": report["seconds"]["total"],
        "forward_cached": report["flops"]["saved"]["forward_cached"],
    }  # fmt: skip


def _best(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return min(results, key=lambda result: result["loss"])


def _keep_the_best_model(results: Sequence[Mapping[str, Any]]) -> None:
    best = _best(results)
    for result in results:
        if result is not best:
            shutil.rmtree(result["model"], ignore_errors=True)


def _write(output: Path, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    report = {
        "schema": SCHEMA, "output": str(output), "best": dict(_best(results)), "trials": [dict(r) for r in results],
        "flops": sum(result["flops"] for result in results), "seconds": sum(result["seconds"] for result in results),
        "fraction_of_full": sum(result["fraction_of_full"] or 0.0 for result in results),
    }  # fmt: skip
    write_bytes(output / RESULT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the trials, best first."""
    from rich.table import Table

    keys = list(report["best"]["searched"])
    table = Table(
        "trial", *keys, "validation loss", "FLOPs of full", "seconds", title=f"{len(report['trials'])} trials"
    )
    for result in sorted(report["trials"], key=lambda result: result["loss"]):
        values = [result["searched"][key] for key in keys]
        table.add_row(
            str(result["trial"]), *(value if isinstance(value, str) else f"{value:.4g}" for value in values),
            f"{result['loss']:.4f}", f"{result['fraction_of_full']:.3f}", f"{result['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"all trials together: {report['fraction_of_full']:.2f} × full fine-tuning, {report['seconds']:.0f} s\n"
        f"best: {report['best']['output']}", highlight=False, soft_wrap=True,
    )  # fmt: skip
