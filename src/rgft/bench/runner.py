"""One run of an experiment: from a fresh model to the figures of its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from rgft.batches import BatchStream
from rgft.bench.earlier import earlier_result
from rgft.bench.experiment import Cell, Experiment
from rgft.bench.judging import judged
from rgft.bench.measures import Extra, MeasuredRun
from rgft.bench.measures.memory import forget_peak
from rgft.bench.measures.undefined import finite
from rgft.bench.methods import method
from rgft.bench.outcomes import Outcomes
from rgft.bench.tasks import bench_task
from rgft.cost import trace_costs
from rgft.errors import ConfigError, DataError
from rgft.partition import partition
from rgft.run import Run, Settings, Task
from rgft.tasks.fingerprint import data_of
from rgft.telemetry.environment import environment
from rgft.workload import Workload

log = logging.getLogger("rgft")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How runs are made, whatever they are: of no effect on what is compared but time.

    Attributes:
        device: where they compute.
        jobs: how many there are at a time, on the same machine.
        allow_code_execution: whether code that a model wrote may be run.
    """

    device: str = "cpu"
    jobs: int = 1
    allow_code_execution: bool = False


ALONE = Conditions()


class TaskError(DataError):
    """The task of an experiment cannot be prepared, whoever is to learn it."""


def run_cell(experiment: Experiment, cell: Cell, conditions: Conditions = ALONE) -> dict[str, Any]:
    """One run from a fresh model to its figures. Test data is evaluated by final runs only.

    Raises:
        TaskError: the task cannot be prepared.
    """
    contender, began = cell.contender, time.perf_counter()
    chosen, own = method(contender.method), cell.settings
    try:
        task = bench_task(experiment.task, seed=cell.seed, allow_code_execution=conditions.allow_code_execution)
    except (DataError, ConfigError) as error:
        raise TaskError(str(error)) from error
    data = data_of(task)
    run_earlier = partial(run_cell, conditions=conditions)
    earlier = None if chosen.follows is None else earlier_result(experiment, cell, data, run_earlier)
    followed = None if chosen.follows is None or earlier is None else chosen.follows(earlier, own)
    lr = cell.lr if followed is None else followed.lr_factor * cell.lr
    settings = Settings(**{"device": conditions.device, **experiment.run, "lr": _of_its_own(own) or lr})
    config = chosen.configuration(
        budget=contender.budget, seed=cell.seed, followed=followed,
        settings=experiment.with_common(contender.method, own),
    )  # fmt: skip
    full_flops = full_fine_tuning_flops(task, settings, seed=cell.seed) if chosen.changes_model else None
    # Test data are not the only ones that a tuning run must not look at; and looking costs time.
    measured = MeasuredRun(experiment.evaluate_of(contender) if cell.is_final else Extra(), task)
    memory = forget_peak()
    torch.manual_seed(cell.seed)
    task.model, task.loss = chosen.prepare(task.model, own), chosen.loss_of(task.loss, own)
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    run = Run(task, config, settings, full_flops=full_flops, optimizer=chosen.optimizer_of(settings, own))
    started = time.perf_counter()
    try:
        run.prepare()
        chosen.begin(run)
        measured.begin(run)
        run.train()
        seconds = time.perf_counter() - started
        own_seconds = seconds - run.guide.ledger.seconds["evaluation"]
        measured.end(run, seconds=seconds)
        metrics = {"validation": run.evaluate(task.validation)} if task.validation is not None else {}
        outcomes: dict[str, str] = {}
        if cell.is_final and task.test is not None:
            tested = Outcomes(task, task.test)
            metrics["test"] = {**run.evaluate(task.test, tested.observe), **judged(run, task)}
            outcomes = tested.to_dict()
        undefined = {split: reasons for split, values in metrics.items() if (reasons := finite(values)[1])}
        metrics = {split: finite(values)[0] for split, values in metrics.items()}
        result, found_lr = run.result(metrics), run.lr
        plans = [plan.to_dict() for plan in run.guide.plans]
        error_map, map_history = run.guide.error_map.to_dict(), run.guide.map_history
        readout = None if run.guide.readout is None else run.guide.readout.to_dict()
    finally:
        run.close()
    log.info("%s: %s in %.0f s", cell.file_name, metrics, own_seconds)
    return {
        "schema": "rgft.result/1",
        **identity_of(experiment, cell),
        "followed": None
        if earlier is None or followed is None
        else {"lr_factor": followed.lr_factor, "flops": earlier["ledger"]["flops"]["spent"]},
        "data": data,
        "device": settings.device,
        "jobs": conditions.jobs,
        "config": config.to_dict(),
        "metrics": metrics,
        "undefined_metrics": undefined,
        "outcomes": outcomes,
        "judged": task.judged_details,
        "measures": measured.after(task),
        "steps": result.steps,
        "found_lr": found_lr,
        "search": None if run.search is None else run.search.to_dict(),
        "seconds": own_seconds,
        "elapsed_seconds": time.perf_counter() - began,
        "median_step_seconds": median(result.step_seconds) if result.step_seconds else None,
        "trainable_parameters": trainable,
        "peak_memory": memory,
        "ledger": result.ledger,
        "plans": plans,
        "error_map": error_map,
        "map_history": map_history,
        "readout": readout,
        "environment": environment(),
    }


def identity_of(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    """Which run a result is of, as a sitting and tables ask for it."""
    contender = cell.contender
    return {
        "contender": contender.label, "method": contender.method, "revision": method(contender.method).revision,
        "budget": contender.budget, "settings": cell.settings, "lr": cell.lr, "seed": cell.seed,
        "is_final": cell.is_final, "task": dict(experiment.task), "run": dict(experiment.run),
        "common_config": dict(experiment.config), "chosen_by": experiment.choose,
        **({} if cell.variant is None else {"variant": cell.variant, "settings_but_for_it": dict(contender.settings)}),
    }  # fmt: skip


def _of_its_own(settings: Mapping[str, Any]) -> tuple[float, ...] | str | None:
    """How a contender with these settings finds a learning rate by itself: among which, or by rule."""
    rates = settings.get("lr")
    return tuple(rates) if isinstance(rates, list) else rates


def full_fine_tuning_flops(task: Task, settings: Settings, *, seed: int) -> float:
    """FLOPs of fully fine-tuning the task's plain model over all epochs."""
    stream = BatchStream(
        task.train, batch_size=settings.batch_size, collate_fn=task.collate, epochs=settings.epochs, seed=seed
    )
    costs = trace_costs(
        task.model, partition(task.model), stream.load(next(stream.indices())),
        loss=lambda model, batch: task.loss(model, batch).mean(),
    )  # fmt: skip
    return Workload.scan(stream).full_flops(costs)
