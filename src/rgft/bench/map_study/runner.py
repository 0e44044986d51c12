"""Running a map study: one result file per seed."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rgft.batches import BatchStream, Subset, on_device
from rgft.bench.claims import Claims
from rgft.bench.durations import TimeLeft
from rgft.bench.fingerprint import DataCheck
from rgft.bench.map_study.maps import Maps
from rgft.bench.map_study.settings import MapStudy
from rgft.bench.map_study.worth import gain_of_training_alone, harm_of_moving, is_classifier, weights_of
from rgft.bench.results import read_result, read_results, write_result
from rgft.bench.runner import ALONE, Conditions
from rgft.bench.sitting import Failure, Job, Outcome, attempt, require_own_names, sit
from rgft.bench.tasks import bench_task
from rgft.errors import DataError
from rgft.evaluation import evaluate
from rgft.execution.binding import Binding
from rgft.execution.views import bind
from rgft.partition import partition
from rgft.tasks.base import PreparedTask
from rgft.tasks.fingerprint import data_of
from rgft.telemetry.environment import environment

log = logging.getLogger("rgft")

SCHEMA = "rgft.map_study/1"

#: What a stored result has in any case.
KEYS: Mapping[str, Any] = {"seed": int, "settings": dict}

#: What a summary needs beside.
OF_A_SUMMARY: Mapping[str, Any] = {
    **KEYS, "study": str, "components": list, "maps": dict, "error_maps": dict, "harm": dict, "gain_alone": dict,
}  # fmt: skip

#: How a component is changed when harm is measured: name → where it goes back to, and the share of its way from there
#: that it keeps. From zero on it is the component itself that is scaled, with what it brought from pre-training.
CHANGES: Mapping[str, tuple[Literal["initial", "zero"], float]] = {
    "reset": ("initial", 0.0),
    "halved": ("initial", 0.5),
    "scaled": ("zero", 0.5),
}


def run_studies(
    studies: Sequence[MapStudy], folder: Path, conditions: Conditions = ALONE, *,
    stop_after_seconds: float | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """Runs the seeds that have no result yet; yields each when it is over.

    A study whose stored results are of other data is left out, and reported at the end.

    Args:
        studies: each with a name of its own.
        folder: of all results; each study has one of its own in it.
        conditions: of the runs.
        stop_after_seconds: the sitting's time, see `sit`; None: it has no end.

    Raises:
        ConfigError: two studies have one name, or there is no room for a job.
        DataError: a stored result is damaged, or of other settings than the study's; before anything is run.
    """
    left = TimeLeft(stop_after_seconds)
    require_own_names("studies", [study.name for study in studies])
    seeds = [_Seeds(study, folder / study.name, conditions) for study in studies]
    yield from sit(seeds, jobs=conditions.jobs, left=left)


def results_by_study(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of all map studies below a folder, by the study's name; see `read_results`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in read_results(folder, SCHEMA, of="map study", named="map-study--*.json", keys=OF_A_SUMMARY):
        found.setdefault(result["study"], []).append(result)
    return found


class _Seeds:
    """The seeds of a study that have no result; see `Source`."""

    def __init__(self, study: MapStudy, folder: Path, conditions: Conditions) -> None:
        self.folder, self.failure = folder, ""
        self._study, self._conditions = study, conditions
        folder.mkdir(parents=True, exist_ok=True)
        paths = {seed: folder / f"map-study--seed{seed}.json" for seed in study.seeds}
        self._stored = {path: read_result(path, KEYS) for path in paths.values() if path.exists()}
        for path, result in self._stored.items():
            _require_same_settings(study, result, path)
        self._lacking = {seed: path for seed, path in paths.items() if path not in self._stored}
        self._claims = Claims(folder)
        self._are_data_known = False
        self._seconds = 0.0
        for result in self._stored.values():
            self._note(result)

    def take(self) -> Job | None:
        if not self._are_data_known:
            self._are_data_known = True
            self._require_same_data()
        seed = next((seed for seed, path in self._lacking.items() if self._claims.take(path)), None)
        if seed is None:
            return None
        path = self._lacking.pop(seed)
        return Job(
            path=path, make=partial(make_seed, self._study, seed, path, self._conditions), seconds=self._seconds,
            end=partial(self._end, path),
        )  # fmt: skip

    def _require_same_data(self) -> None:
        check = DataCheck(lambda seed: bench_task(self._study.task, seed=seed))
        if objection := check.objection(self._stored.items(), self.folder, are_needed=bool(self._lacking)):
            self.failure = f"nothing of {self._study.name!r} is run: {objection}"
            self._lacking.clear()

    def close(self) -> None:
        self._claims.close()

    def _end(self, path: Path, failure: Failure | None) -> None:
        self._claims.release(path)
        if failure is None:
            self._note(read_result(path, KEYS))
        elif failure.concerns != "run" and self._lacking:
            self._lacking.clear()
            log.warning("%s: the other seeds of this study are left out", path)

    def _note(self, result: Mapping[str, Any]) -> None:
        """The longest says how long others may take; what another device took says nothing."""
        if result.get("device", "cpu") == self._conditions.device:
            self._seconds = max(self._seconds, result.get("seconds", 0.0))


def make_seed(study: MapStudy, seed: int, path: Path, conditions: Conditions) -> Failure | None:
    """Runs a seed and writes its result; says why there is none."""

    def make() -> None:
        task = bench_task(study.task, seed=seed)
        task.model.to(conditions.device)
        result = run_seed(study, task, seed=seed)
        write_result(path, {**result, "device": conditions.device, "jobs": conditions.jobs})

    return attempt(make)


def _require_same_settings(study: MapStudy, result: Mapping[str, Any], path: Path) -> None:
    """Raises DataError where a stored result is of other settings; other seeds may have come or gone."""
    wanted, found = json.loads(json.dumps(asdict(study))), result["settings"]
    differing = [
        f"{path}: expected a result with the study's {key!r} ({wanted.get(key)}), found one with {found.get(key)}"
        for key in sorted({*wanted, *found} - {"seeds"})
        if wanted.get(key) != found.get(key)
    ]
    if differing:
        raise DataError("\n".join([*differing, "Give the study another name, or delete the files to run it anew"]))


def run_seed(study: MapStudy, task: PreparedTask, *, seed: int) -> dict[str, Any]:
    """Takes maps of a model while it trains, and measures what its components are worth before and after.

    Args:
        study: what to run.
        task: its model is trained, on the device where it is; a tenth of its training set (at most ten looks' worth)
            is looked at and not trained on.
        seed: of everything random.

    Raises:
        DataError: the task has no validation split, or too few training examples.
    """
    if task.validation is None:
        raise DataError("a map study needs a validation split to measure harm on, and this task has none")
    if len(task.train) < 10 * study.probe_size:
        raise DataError(
            f"probe_size {study.probe_size}: expected at least {10 * study.probe_size} training examples, a tenth of "
            f"which is looked at; found {len(task.train)}"
        )
    started = time.perf_counter()
    order = random.Random(f"{seed}/map study").sample(range(len(task.train)), len(task.train))
    spare = min(len(order) // 10, 10 * study.probe_size)
    pool, train = Subset(task.train, order[:spare]), Subset(task.train, order[spare:])
    held = Subset(
        task.validation,
        random.Random(f"{seed}/held").sample(range(len(task.validation)), min(study.examples, len(task.validation))),
    )
    binding = bind(task.model, partition(task.model, study.granularity))
    try:
        loop = _Loop(study, task, train, binding, seed=seed)

        def held_out_loss() -> float:
            return evaluate(task, held, batch_size=study.eval_batch_size, loss=loop.loss_of_each)["loss"]

        initial, before = weights_of(binding), held_out_loss()
        gain = gain_of_training_alone(binding, held_out_loss, loop.alone) if study.alone_steps else {}
        maps = loop.everything(pool)
        after = held_out_loss()
        zero = {name: [torch.zeros_like(weights) for weights in own] for name, own in initial.items()}
        origins = {"initial": initial, "zero": zero}
        harm = {
            name: harm_of_moving(binding, origins[origin], held_out_loss, share=share)
            for name, (origin, share) in CHANGES.items()
        }
        components = [
            {
                "name": c.name, "kind": c.kind, "depth": c.depth, "parameters": c.numel,
                "is_classifier": is_classifier(c),
            }
            for c, _ in binding
        ]  # fmt: skip
    finally:
        binding.restore()
    seconds = time.perf_counter() - started
    log.info("%s, seed %d: loss %.3f before, %.3f after, in %.0f s", study.name, seed, before, after, seconds)
    return {
        "schema": SCHEMA, "study": study.name, "seed": seed, "settings": asdict(study),
        "data": data_of(task), "components": components,
        "loss": {"before": before, "after": after}, "maps": maps.history, "error_maps": maps.error_maps, "harm": harm,
        "gain_alone": gain, "seconds": seconds, "environment": environment(),
    }  # fmt: skip


class _Loop:
    """The two kinds of training: everything, with looks between steps, and one component beside the classifier."""

    def __init__(self, study: MapStudy, task: PreparedTask, train: Subset, binding: Binding, *, seed: int) -> None:
        self._study, self._task, self._train, self._binding, self._seed = study, task, train, binding, seed
        self._device = next(task.model.parameters()).device
        self._heads = {id(p) for component, params in binding if is_classifier(component) for p in params}

    def everything(self, pool: Subset) -> Maps:
        """Trains all components and takes the maps on the way."""
        study = self._study
        on = [p for _, parameters in self._binding for p in parameters]
        optimizer = self._optimizer(on)
        schedule = LambdaLR(optimizer, lambda step: 1.0 - step / study.steps)
        maps = Maps(
            self._task, pool, self._binding, study.signals, optimizer=optimizer, loss=self._loss, size=study.probe_size,
            seed=self._seed,
        )  # fmt: skip
        try:
            torch.manual_seed(self._seed)
            for step, batch in enumerate(self._batches(study.steps)):
                if step in study.look_steps:
                    maps.look(step)
                self._step(batch, on, optimizer)
                schedule.step()
            maps.look(study.steps)
        finally:
            maps.detach()
        return maps

    def alone(self, on: Sequence[nn.Parameter]) -> None:
        """Trains these parameters on the first batches, with the same dropout at each call as far as it reaches."""
        optimizer = self._optimizer(on)
        torch.manual_seed(self._seed)
        for batch in self._batches(self._study.alone_steps):
            self._step(batch, on, optimizer)

    def _optimizer(self, on: Sequence[nn.Parameter]) -> AdamW:
        study, heads = self._study, [p for p in on if id(p) in self._heads]
        groups = [
            {"params": [p for p in on if id(p) not in self._heads], "lr": study.lr},
            {"params": heads, "lr": study.lr * study.classifier_lr_multiplier},
        ]
        return AdamW([group for group in groups if group["params"]], weight_decay=study.weight_decay)

    def _batches(self, count: int) -> Iterator[Any]:
        stream = BatchStream(
            self._train, batch_size=self._study.batch_size, collate_fn=self._task.collate, epochs=None, seed=self._seed
        )
        for indices, _ in zip(stream.indices(), range(count), strict=False):
            yield stream.load(indices)

    def loss_of_each(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each example, on the model's device."""
        return self._task.loss(model, on_device(batch, self._device))

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss_of_each(model, batch).mean()

    def _step(self, batch: Any, on: Sequence[nn.Parameter], optimizer: AdamW) -> None:
        self._task.model.train()
        self._loss(self._task.model, batch).backward()
        nn.utils.clip_grad_norm_(on, 1.0)
        optimizer.step()
        optimizer.zero_grad()
