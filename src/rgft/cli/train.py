"""`rgft train`: from a request to a run folder."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import rgft
from rgft.cli.failures import Interrupted
from rgft.cli.model_card import model_card
from rgft.cli.preparing import prepare_task, run_settings
from rgft.cli.preview import low_rank, preview
from rgft.cli.progress import watching
from rgft.cli.request import Request
from rgft.errors import RGFTError, RGFTWarning, RunFolderError
from rgft.guide import Guide
from rgft.run import Run
from rgft.tasks.base import PreparedTask
from rgft.tasks.fingerprint import inputs_of, require_same_inputs
from rgft.telemetry.energy import energy_text
from rgft.telemetry.environment import environment
from rgft.telemetry.run_folder import CONFIG, ENVIRONMENT, ERROR_MAP, LEDGER, MEMORY, RunFolder

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "rgft.run/1"

#: Key of the configuration file for what the run is made from; runs from before it was kept have none.
INPUTS = "inputs"


def describe_run(request: Request) -> dict[str, Any]:
    """What `--dry-run` shows (see `preview`); nothing is trained or written."""
    run = _run(prepare_task(request.settings), request)
    try:
        run.prepare()
        return preview(run)
    finally:
        run.close()


def stored_request(output: Path) -> Mapping[str, Any]:
    """The request of the run in a folder, for `read_request`.

    Raises:
        RunFolderError: there is none, or it was made by another version.
    """
    RunFolder.check(output, resume=True)
    data = RunFolder(output).read_json(CONFIG)
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise RunFolderError(
            f"{output / CONFIG}: expected schema {SCHEMA!r}, found {schema!r}; resume with what began the run"
        )
    return data


def run_training(
    request: Request, output: Path, *, resume: bool, overwrite: bool, console: Console, quiet: bool
) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder; returns what was reached and spent, fit for JSON.

    Whatever may be refused is refused before the folder is touched.

    Args:
        console: where progress goes: standard error.

    Raises:
        RGFTError: anything given is wrong, or the run failed; the last good checkpoint stays.
        Interrupted: a signal ended it; a checkpoint to resume from was saved.
    """
    RunFolder.check(output, resume=resume, overwrite=overwrite)
    if resume and (report := finished(RunFolder(output))) is not None:
        return report
    with watching(console, quiet=quiet) as observers:
        task = prepare_task(request.settings)
        if resume:
            check_inputs(RunFolder(output), task)
        run = _run(task, request)
        run.observers.extend(observers)
        try:
            run.prepare()
            with RunFolder.create(output, resume=resume, overwrite=overwrite) as folder:
                run.folder = folder
                if not resume:
                    folder.write_json(CONFIG, {"schema": SCHEMA, **request.to_dict(), INPUTS: inputs_of(task)})
                folder.write_json(ENVIRONMENT, environment())
                return _recorded(run, task, request, folder, resume=resume)
        finally:
            run.close()


def check_inputs(folder: RunFolder, task: PreparedTask) -> None:
    """Makes sure that the task is what the run in the folder was made from.

    Raises:
        DataError: it is not.
    """
    then = folder.read_json(CONFIG).get(INPUTS)
    if then is not None:
        require_same_inputs(then, task, str(folder.path))


def _run(task: PreparedTask, request: Request) -> Run:
    return Run(task, request.config, run_settings(request.settings))


def _recorded(
    run: Run, task: PreparedTask, request: Request, folder: RunFolder, *, resume: bool
) -> dict[str, Any]:  # fmt: skip
    """The run, with how it ended as its last record."""
    try:
        if resume:
            _go_on(run, folder)
        chosen = run.prepare().memory
        if chosen is not None:
            folder.write_json(MEMORY, {"schema": "rgft.memory/1", **asdict(chosen)})
        with stopped_by_signals(run) as received:
            run.train()
        if received:
            raise Interrupted(_how_to_resume(run, folder), received[0])
        return _finish(run, task, request, folder)
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt | Interrupted)
        end = {"status": "interrupted" if is_interrupt else "failed", "steps": run.guide.step_count}
        # The record of the failure must not hide the failure: on a full disk neither can be written.
        with suppress(RGFTError):
            folder.records.append("end", {**end, "message": str(error)})
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(_how_to_resume(run, folder)) from error
        raise


def _go_on(run: Run, folder: RunFolder) -> None:
    if folder.has_checkpoint:
        run.resume()
        return
    # Ended before its first checkpoint: the same run from its first step.
    folder.records.rewind(0)
    folder.plans.rewind(0)


def _how_to_resume(run: Run, folder: RunFolder) -> str:
    return f"after step {run.guide.step_count}; go on with: rgft train --resume --output {folder.path}"


@contextmanager
def stopped_by_signals(run: Run) -> Iterator[list[int]]:
    """Inside, Ctrl-C or SIGTERM ends the run after the step in hand; the list then holds the signal's number.

    A second one of the same kind does what it always does.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # handlers can be set in the main thread only
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        run.stop()
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(run: Run, task: PreparedTask, request: Request, folder: RunFolder) -> dict[str, Any]:
    """Evaluates, saves all results, and marks the run as finished."""
    # From here on an interruption costs the evaluation only.
    run.checkpoint()
    guide = run.guide
    metrics: dict[str, dict[str, float]] = {}
    for split, data in (("validation", task.validation), ("test", task.test)):
        if data is not None and len(data) > 0:
            metrics[split] = run.evaluate(data)
            folder.records.append("evaluation", {"step": guide.step_count, "split": split, "metrics": metrics[split]})
    ledger = guide.summary()
    folder.write_json(LEDGER, {**ledger, "state": guide.ledger.to_dict()})
    folder.write_json(ERROR_MAP, error_map(run))
    plan = guide.plan.to_dict()
    run.close()
    pairs = low_rank(guide)
    folder.save_model(
        lambda path: save_model(task, request, path, metrics=metrics, ledger=ledger, lr=run.lr, pairs=pairs)
    )
    report = {
        "status": "finished", "output": str(folder.path), "model": str(folder.model), "steps": guide.step_count,
        "lr": run.lr, "low_rank": pairs, "search": None if run.search is None else run.search.to_dict(),
        "metrics": metrics, "primary_metric": task.primary_metric, "flops": ledger["flops"], "audit": ledger["audit"],
        "seconds": ledger["seconds"], "energy": ledger["energy"], "memory": ledger["memory"],
        "parameters": ledger["parameters"], "data": ledger["data"], "plan": plan,
    }  # fmt: skip
    folder.records.append("end", report)
    folder.remove_checkpoint()
    if remark := beyond_budget(guide):
        warnings.warn(remark, RGFTWarning, stacklevel=2)
    return report


def beyond_budget(guide: Guide) -> str:
    """A line about a budget of seconds or joules that the first step alone went beyond; "" where none did."""
    budget, ledger = guide.config.budget, guide.ledger
    if budget is None or guide.step_count > 1:
        return ""
    limits = ((budget.seconds, ledger.elapsed, _seconds), (budget.joules, ledger.spent_joules, energy_text))
    beyond = [
        f"{text(spent)} were spent of a budget of {text(limit)}" for limit, spent, text in limits
        if limit is not None and spent > limit
    ]  # fmt: skip
    if not beyond:
        return ""
    return (
        f"{' and '.join(beyond)}: what a step takes is known once one was made, and the first alone went beyond it; a "
        "run needs at least that much"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def finished(folder: RunFolder) -> dict[str, Any] | None:
    """The report of a run that came to its end, with where its folder is now; None of one that did not."""
    if not (folder.path / "records.jsonl").exists():
        return None
    ends = [record for record in folder.read_records() if record.type == "end"]
    if not ends or ends[-1].data["status"] != "finished":
        return None
    return {**ends[-1].data, "output": str(folder.path), "model": str(folder.model)}


def error_map(run: Run) -> dict[str, Any]:
    """The map as it is, its uncertainty, what it was at each probe, and what was read before the first step."""
    now = run.guide.error_map
    return {
        "schema": "rgft.error_map/1", "values": now.values(),
        "standard_errors": {name: now.standard_error(name) for name in now.observed},
        "map": now.to_dict(),
        "history": [{"step": step + 1, "values": values} for step, values in run.guide.map_history],
        "readout": None if run.guide.readout is None else run.guide.readout.to_dict(),
    }  # fmt: skip


def save_model(
    task: PreparedTask, request: Request, path: Path, *, metrics: Mapping[str, Mapping[str, float]],
    ledger: Mapping[str, Any], lr: float, pairs: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Model, tokenizer (or image processor) and model card, as `from_pretrained` reads them."""
    model: Any = task.model
    model.save_pretrained(path)
    if task.processor is not None:
        task.processor.save_pretrained(path)
    text = model_card(
        request.settings, metrics=metrics, ledger=ledger, lr=lr, pairs=pairs, version=rgft.__version__
    )  # fmt: skip
    (path / "README.md").write_text(text, encoding="utf-8")
