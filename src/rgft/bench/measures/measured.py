"""The extra evaluations of one final run, from before it begins to after it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import torch

from rgft.bench.measures.along import QualityAlong
from rgft.bench.measures.forgetting import GeneralQuality
from rgft.bench.measures.other_domain import other_domain
from rgft.bench.measures.settings import Extra
from rgft.bench.measures.undefined import finite
from rgft.bench.measures.weights import StartingPoint
from rgft.run import Run
from rgft.tasks.base import PreparedTask
from rgft.tasks.fingerprint import part_of

log = logging.getLogger("rgft")


class MeasuredRun:
    """Extra evaluations of a run. They leave it as it would have been without them.

    What can be refused is refused before the run begins. What fails after it is `undefined` in the result, with the
    reason, and its trace in the log: a run that is done is not lost for it.

    Args:
        extra: what is evaluated.
        task: with its plain model, before a method wraps it. What is needed of it is copied.

    Raises:
        ConfigError, DataError: something cannot be measured of this task, or its texts cannot be had.
    """

    def __init__(self, extra: Extra, task: PreparedTask) -> None:
        self._start = StartingPoint.of(task.model) if extra.weights else None
        wants_general = extra.general_texts > 0 or extra.probe is not None
        self._general = (
            GeneralQuality.of(task, texts=extra.general_texts, corpus=extra.general_corpus, probe=extra.probe)
            if wants_general
            else None
        )
        with torch.random.fork_rng(devices=[]):
            self._domains = {name: other_domain(name, task) for name in extra.other_domains}
        self._along: QualityAlong | None = None
        if extra.follows_run and task.validation is not None:
            self._along = QualityAlong(task.validation, at=extra.at, each_epoch=extra.each_epoch)
        self._found: dict[str, Any] = {}
        if extra.follows_run and task.validation is None:
            self._found["along"] = {"undefined": "the task has no validation split"}

    def begin(self, run: Run) -> None:
        """Before the first step."""
        if self._along is not None:
            self._along.watch(run)

    def end(self, run: Run, *, seconds: float) -> None:
        """When the run is over and the guide still attached.

        Args:
            seconds: of the run, evaluations included.
        """
        if self._along is not None:
            self._along.end(seconds=seconds)
            self._found["along"] = self._along.points
        if self._domains:
            self._found["other_domains"] = {name: _measured(name, self._of_domain, run, name) for name in self._domains}

    def after(self, task: PreparedTask) -> dict[str, Any]:
        """What was found; the guide must have left the model.

        Args:
            task: with the trained model.
        """
        if self._start is not None:
            self._found["weights"] = _measured("weights", self._start.compare, task.model)
        if self._general is not None:
            self._found["general"] = _measured("general", self._general.compare, task)
        return self._found

    def _of_domain(self, run: Run, name: str) -> dict[str, Any]:
        examples, left_out = self._domains[name]
        metrics, undefined = finite(run.evaluate(examples)) if examples else ({}, {"loss": "no texts are left"})
        return {
            "examples": len(examples), "left_out": left_out, "metrics": metrics, "undefined": undefined,
            "data": part_of(examples),
        }  # fmt: skip


def _measured(name: str, measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What is measured; where that fails, or is nothing that JSON can hold, why it is undefined."""
    try:
        found = measure(*args)
        json.dumps(found, allow_nan=False)
    except Exception as error:
        log.exception("the run is done, and its extra measure %r has failed:", name)
        return {"undefined": f"{type(error).__name__}: {error}"}
    return found
