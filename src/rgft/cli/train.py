"""`rgft train`: from options to a run folder."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, cast

from rgft.batches import BatchStream
from rgft.cli.options import Train
from rgft.config import Config, apply_overrides
from rgft.errors import ConfigError, RunFolderError
from rgft.run import Run, Settings, StepReport
from rgft.tasks.base import PreparedTask
from rgft.tasks.text_classification import text_classification
from rgft.telemetry.environment import environment
from rgft.telemetry.run_folder import RunFolder


def run_training(options: Train) -> dict[str, Any]:
    """Trains, evaluates and writes the run folder; returns what was reached and spent.

    Raises:
        RGFTError: anything given is wrong, or the run failed; what was written before stays.
        SystemExit: 130 after Ctrl-C, with a checkpoint to resume from.
    """
    config, settings = configuration(options)
    task = text_classification(
        model=options.model, train=options.data, text=options.text, label=options.label,
        regression=options.regression, validation=options.validation, test=options.test,
        max_length=options.max_length, seed=options.seed,
    )  # fmt: skip
    if options.dry_run:
        return describe(task, config, settings, quiet=options.quiet)
    description = {"task": _plain(options), "run": asdict(settings), "rgft": config.to_dict()}
    with RunFolder.create(options.output, resume=options.resume, overwrite=options.overwrite) as folder:
        if options.resume:
            _require_same(folder, description)
        else:
            folder.write_json("config.json", description)
        folder.write_json("environment.json", environment())
        return _train(task, config, settings, options, folder)


def configuration(options: Train) -> tuple[Config, Settings]:
    """RGFT's configuration and the run's settings; all problems of both at once."""
    problems: list[str] = []
    config, settings = Config(), Settings()
    try:
        data = {"classifier_lr_multiplier": 10.0, "budget": options.budget, "seed": options.seed}
        config = Config.from_dict(apply_overrides(data, options.settings))
    except ConfigError as error:
        problems += error.problems
    try:
        settings = Settings(
            lr=options.lr, epochs=options.epochs, batch_size=options.batch_size,
            checkpoint_every=options.checkpoint_every,
        )  # fmt: skip
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config, settings


def _train(task: PreparedTask, config: Config, settings: Settings, options: Train, folder: RunFolder) -> dict[str, Any]:
    run = Run(task, config, settings, folder=folder, observers=() if options.quiet else (show_progress,))
    try:
        if options.resume and folder.has_checkpoint:
            run.resume()
        with stopping_on_interrupt(run):
            run.train()
        if run.was_stopped:
            print(f"stopped after step {run.guide.step_count}; --resume goes on", file=sys.stderr)
            sys.exit(130)
        metrics = {
            split: run.evaluate(data)
            for split, data in (("validation", task.validation), ("test", task.test))
            if data is not None
        }
        guide = run.guide
        folder.write_json("ledger.json", guide.summary())
        folder.write_json("error_map.json", {"map": guide.error_map.to_dict(), "history": guide.map_history})
        folder.records.append("end", {"step": guide.step_count, "metrics": metrics})
        report = {
            "steps": guide.step_count, "metrics": metrics, "flops_fraction": guide.flops_fraction,
            "output": str(options.output),
        }  # fmt: skip
    finally:
        run.close()
    cast("Any", task.model).save_pretrained(folder.model)
    task.processor.save_pretrained(folder.model)
    if not options.quiet:
        print(json.dumps(report, indent=1), file=sys.stderr)
    return report


@contextmanager
def stopping_on_interrupt(run: Run) -> Iterator[None]:
    """Inside, the first Ctrl-C ends the run after the step in hand; a second one ends the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def describe(task: PreparedTask, config: Config, settings: Settings, *, quiet: bool) -> dict[str, Any]:
    """Components, run plan and predicted cost; nothing is trained or written."""
    run = Run(task, config, settings)
    try:
        stream = BatchStream(
            task.train,
            batch_size=settings.batch_size,
            collate_fn=task.collate,
            epochs=settings.epochs,
            seed=config.seed,
        )
        plan = run.guide.prepare(stream)
        components = [
            {"name": c.name, "kind": c.kind, "depth": c.depth, "parameters": c.numel} for c in run.guide.partition
        ]
    finally:
        run.close()
    if not quiet:
        for item in components:
            print(f"{item['depth']:3d}  {item['kind']:<12} {item['parameters']:>12,}  {item['name']}", file=sys.stderr)
        print(
            f"full fine-tuning {plan.full_flops:.3g} FLOPs; this run at most {plan.flops:.3g} "
            f"({plan.flops / plan.full_flops:.0%}); at least {plan.steps} steps; {plan.probes} probes of "
            f"{plan.probe_size} examples",
            file=sys.stderr,
        )
    return {"components": components, "run_plan": plan.to_dict()}


def show_progress(report: StepReport) -> None:
    """One line every tenth step, on standard error."""
    if report.step % 10 == 0:
        left = report.seconds / max(report.progress, 1e-9) - report.seconds
        captured = "" if report.captured is None else f"  captured {report.captured:.0%}"
        print(
            f"step {report.step}  loss {report.loss:.4f}  spent {report.progress:.0%}  {left:.0f} s left  "
            f"{report.active}/{report.components} on{captured}  errs most: {', '.join(name for name, _ in report.top)}",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _plain(options: Train) -> dict[str, Any]:
    """What decides the result; flags of this call do not."""
    passing = {"output", "resume", "overwrite", "dry_run", "quiet", "settings", "checkpoint_every"}
    return {name: value for name, value in asdict(options).items() if name not in passing}


def _require_same(folder: RunFolder, description: dict[str, Any]) -> None:
    saved = folder.read_json("config.json")
    now = json.loads(json.dumps(description))
    for part in ("task", "rgft"):
        different = sorted(key for key in now[part] if saved[part].get(key) != now[part][key])
        if different:
            raise RunFolderError(
                f"{folder.path}: --resume goes on with the same settings; different now: {', '.join(different)}"
            )
