"""`rgft sweep`: the same run under several settings, on one activation cache; the best by validation loss is kept.

Optuna proposes the settings and remembers the trials. A trial is a run folder like any other. Where layers are frozen
from the first step on, their activations are computed by the first trial and read by all others.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgft.cli.failures import Interrupted
from rgft.cli.preparing import prepare_task
from rgft.cli.request import SECTION, Request, read_request
from rgft.cli.train import check_inputs, run_training
from rgft.errors import ConfigError, NonFiniteError
from rgft.telemetry.atomic_write import write_bytes
from rgft.telemetry.run_folder import RunFolder

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution
    from rich.console import Console

log = logging.getLogger("rgft")

RESULT, STUDY, CACHE = "sweep.json", "study.log", "activations"
SCHEMA = "rgft.sweep/1"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One setting that is searched: a choice, or a range of numbers.

    Attributes:
        key: of the setting, as `--set` takes it.
        choices: values as written; empty for a range.
        low, high: ends of a range. Positive ends a factor of ten or more apart are searched on a logarithmic scale.
        is_whole: whether the range is of integers: both ends were written as such.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False

    @classmethod
    def parse(cls, text: str) -> Dimension:
        """Reads `KEY=A,B,C` or `KEY=LOW:HIGH`.

        Raises:
            ConfigError: it is neither.
        """
        key, _, values = (part.strip() for part in text.partition("="))
        key = key.removeprefix(f"{SECTION}.")
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
        return cls(
            key=key, low=low, high=high, is_whole=all(re.fullmatch(r"\s*\d+\s*", end) for end in values.split(":"))
        )

    @property
    def distribution(self) -> BaseDistribution:
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        is_log = self.low > 0.0 and self.high >= 10.0 * self.low
        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=is_log)
        return FloatDistribution(self.low, self.high, log=is_log)

    @property
    def examples(self) -> tuple[Any, ...]:
        """All choices, or the ends of the range."""
        return self.choices or tuple(int(end) if self.is_whole else end for end in (self.low, self.high))


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
        RGFTError: anything given is wrong (before any trial; that the data are other ones than those of the trials
            that there are is wrong, too), or a trial failed.
    """
    _check(dimensions, output, resume=resume)
    count = _number(dimensions, trials)
    known = _unfinished(output) if resume else None

    def request(values: Mapping[str, Any], more: Sequence[str] = ()) -> Request:
        searched = [f"{key}={value}" for key, value in values.items()]
        return read_request(file=file, overrides=[*overrides, *more, *searched], flags=flags, rgft_flags=rgft_flags)

    given = request({})
    cache = _cache(output, given)
    for dimension in dimensions:  # whatever is refused is refused before the first trial
        for value in dimension.examples:
            if request({dimension.key: value}, cache).settings.test is not None:
                raise ConfigError("test: a sweep chooses on validation data; found test data, which no trial may see")
    about = {
        "request": given.to_dict(), "search": [{**asdict(item), "choices": list(item.choices)} for item in dimensions]
    }  # fmt: skip
    if known is not None and known["about"] != json.loads(json.dumps(about)):
        raise ConfigError(
            f"--resume: the sweep in {output} was started with other settings, or searches others; its trials would "
            "not be comparable. Give the same command, or another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: expected a folder, found {output}: {error.strerror or error}") from error
    results: list[dict[str, Any]] = [] if known is None else known["trials"]
    if results and len(results) < count:
        first = results[0]
        task = prepare_task(request(first["searched"], cache).settings)
        check_inputs(RunFolder(_folder(output, first["trial"])), task)
    _write(output, about, results)
    study = _study(output, given.settings.seed)
    if known is None and all(dimension.choices for dimension in dimensions):
        for values in list(product(*(dimension.choices for dimension in dimensions)))[:count]:
            study.enqueue_trial(dict(zip((dimension.key for dimension in dimensions), values, strict=True)))
    for left in [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "RUNNING"]:
        study.enqueue_trial(left.params)
        study.tell(left.number, state=_failed())
    while len(results) < count:
        trial = study.ask({dimension.key: dimension.distribution for dimension in dimensions})
        result = _run(trial, request(trial.params, cache), output, console=console, quiet=quiet)
        results.append(result)
        if result["loss"] is None:
            study.tell(trial, state=_failed())
        else:
            study.tell(trial, result["loss"])
            _keep_the_best_model(results)
        _write(output, about, results)
    if not any(result["loss"] is not None for result in results):
        raise NonFiniteError(f"all {len(results)} trials diverged; search lower learning rates")
    return _write(output, about, results)


def _unfinished(output: Path) -> dict[str, Any]:
    try:
        return json.loads((output / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {output / RESULT}: expected the sweep's results: {error}") from error


def _check(dimensions: Sequence[Dimension], output: Path, *, resume: bool) -> None:
    keys = [dimension.key for dimension in dimensions]
    if not keys or len(set(keys)) < len(keys):
        raise ConfigError(f"--search: expected each setting to search once, found {', '.join(keys) or 'none'}")
    if resume != (output / RESULT).exists():
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
    return min(trials, combinations) if trials and combinations else trials or combinations


def _cache(output: Path, given: Request) -> list[str]:
    """One cache on disk for all trials, where the user wants none of another kind."""
    execution = given.config.execution
    if given.config.preset == "full" or execution.cache != "auto" or execution.cache_dir:
        return []
    return [f"execution.cache_dir={output / CACHE}"]


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


def _run(trial: Trial, request: Request, output: Path, *, console: Console, quiet: bool) -> dict[str, Any]:
    folder = _folder(output, trial.number)
    try:
        report = run_training(request, folder, resume=False, overwrite=True, console=console, quiet=quiet)
    except Interrupted as error:
        raise Interrupted(f"in trial {trial.number}; go on with the same command and --resume", error.number) from error
    except NonFiniteError as error:
        log.warning("trial %d diverged: %s", trial.number, error)
        return {"trial": trial.number, "searched": dict(trial.params), "loss": None, "output": str(folder)}
    return _result(trial.number, trial.params, report)


def _folder(output: Path, number: int) -> Path:
    return output / f"trial-{number:03d}"


def _result(number: int, params: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    metrics = report["metrics"]["validation"]
    return {
        "trial": number, "searched": dict(params), "loss": metrics["loss"], "metrics": metrics,
        "output": report["output"], "model": report["model"], "flops": report["flops"]["spent"],
        "fraction_of_full": report["flops"]["fraction_of_full"], "seconds": report["seconds"]["total"],
        "forward_cached": report["flops"]["saved"]["forward_cached"],
    }  # fmt: skip


def _converged(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Best first."""
    return sorted((r for r in results if r["loss"] is not None), key=lambda result: result["loss"])


def _keep_the_best_model(results: Sequence[Mapping[str, Any]]) -> None:
    for result in _converged(results)[1:]:
        shutil.rmtree(result["model"], ignore_errors=True)


def _write(output: Path, about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ranked = _converged(results)
    report = {
        "schema": SCHEMA, "output": str(output), "about": dict(about), "best": dict(ranked[0]) if ranked else None,
        "trials": [dict(result) for result in results], "flops": sum(result["flops"] for result in ranked),
        "seconds": sum(result["seconds"] for result in ranked),
        "fraction_of_full": sum(result["fraction_of_full"] or 0.0 for result in ranked),
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
    for result in _converged(report["trials"]):
        values = [result["searched"][key] for key in keys]
        table.add_row(
            str(result["trial"]), *(value if isinstance(value, str) else f"{value:.4g}" for value in values),
            f"{result['loss']:.4f}", f"{result['fraction_of_full']:.3f}", f"{result['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    diverged = [str(result["trial"]) for result in report["trials"] if result["loss"] is None]
    if diverged:
        console.print(f"diverged, and not counted: trials {', '.join(diverged)}")
    console.print(
        f"all trials together: {report['fraction_of_full']:.2f} × full fine-tuning, {report['seconds']:.0f} s\n"
        f"best: {report['best']['output']}", highlight=False, soft_wrap=True,
    )  # fmt: skip
