"""Running a map study: one result file per seed."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rgft.batches import BatchStream, Subset
from rgft.bench.fingerprint import DataCheck, DataMissingError
from rgft.bench.map_study.maps import Maps
from rgft.bench.map_study.settings import MapStudy
from rgft.bench.map_study.worth import gain_of_training_alone, harm_of_undoing, is_classifier, weights_of
from rgft.bench.results import read_result, write_result
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
#: Shares of a component's update that are kept when harm is measured.
KEPT = {"reset": 0.0, "halved": 0.5}


def run_study(study: MapStudy, folder: Path) -> Iterator[Path]:
    """Runs the seeds that have no result yet; yields the path of each new one.

    Raises:
        DataError: a stored result is damaged, or of other settings or data than the study's; before anything is run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {seed: folder / f"map-study--seed{seed}.json" for seed in study.seeds}
    stored = {path: read_result(path, {"seed": int, "settings": dict}) for path in paths.values() if path.exists()}
    for path, result in stored.items():
        _require_same_settings(study, result, path)
    check = DataCheck(lambda seed: bench_task(study.task, seed=seed))
    try:
        for path, result in stored.items():
            check.require_same(result, str(path))
    except DataMissingError as error:
        if len(stored) < len(paths):
            raise
        log.info("%s: not compared with the data of now: %s", folder, error)
    if check.unknown:
        log.info("%s: %d results are from before data had fingerprints", folder, check.unknown)
    for seed, path in paths.items():
        if path not in stored:
            write_result(path, run_seed(study, bench_task(study.task, seed=seed), seed=seed))
            yield path


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
        task: its model is trained; a tenth of its training set (at most ten looks' worth) is looked at and not trained
            on.
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
            return evaluate(task, held, batch_size=study.eval_batch_size, loss=task.loss)["loss"]

        initial, before = weights_of(binding), held_out_loss()
        gain = gain_of_training_alone(binding, held_out_loss, loop.alone) if study.alone_steps else {}
        maps = loop.everything(pool)
        after = held_out_loss()
        harm = {name: harm_of_undoing(binding, initial, held_out_loss, share=share) for name, share in KEPT.items()}
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

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.loss(model, batch).mean()

    def _step(self, batch: Any, on: Sequence[nn.Parameter], optimizer: AdamW) -> None:
        self._task.model.train()
        self._loss(self._task.model, batch).backward()
        nn.utils.clip_grad_norm_(on, 1.0)
        optimizer.step()
        optimizer.zero_grad()
