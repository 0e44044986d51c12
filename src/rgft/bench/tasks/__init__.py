"""The tasks of the bench: real data, split so that nothing that is tested on was seen in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rgft.bench.tasks import code, glue, instructions, language, movies, news, summarisation, superglue, vision
from rgft.errors import ConfigError
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import demo_task

__all__ = ["TASKS", "BenchTask", "bench_task"]


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """A task of the bench.

    Attributes:
        title: in tables.
        source: where its texts come from; tasks of one source are not independent.
        prepare: settings and seed → model, data and loss.
        metric: the one that tables show beside the loss.
        told_apart_by: settings that make it another task, with data of its own.
        executes_code: whether it runs code that a model wrote, if whoever runs the bench allows it.
    """

    title: str
    source: str
    prepare: Callable[..., PreparedTask]
    metric: str = "accuracy"
    told_apart_by: tuple[str, ...] = ()
    executes_code: bool = False

    def variant(self, settings: Mapping[str, Any]) -> str:
        """Which of its tasks it is, in words; empty where it is one."""
        known = inspect.signature(self.prepare).parameters
        values = [settings.get(name, known[name].default) for name in self.told_apart_by]
        return ", ".join(str(value) for value in values if value is not None)


TASKS: Mapping[str, BenchTask] = {
    "rotten_tomatoes": BenchTask(title="Rotten Tomatoes", source="movie reviews", prepare=demo_task),
    "sst2": BenchTask(title="SST-2", source="movie reviews", prepare=glue.sst2),
    "cola": BenchTask(title="CoLA", source="CoLA", prepare=glue.cola, metric="matthews"),
    "mrpc": BenchTask(title="MRPC", source="MRPC", prepare=glue.mrpc),
    "bbc": BenchTask(title="BBC news", source="BBC", prepare=news.bbc),
    "newsgroups": BenchTask(title="20 Newsgroups", source="newsgroups", prepare=news.newsgroups),
    "imdb": BenchTask(title="IMDB", source="IMDB", prepare=movies.imdb),
    "superglue": BenchTask(
        title="GLUE and SuperGLUE", source="GLUE and SuperGLUE", prepare=superglue.superglue, told_apart_by=("task",)
    ),
    "digits": BenchTask(title="MNIST digits", source="MNIST", prepare=vision.digits),
    "images": BenchTask(title="images", source="images", prepare=vision.images, told_apart_by=("data",)),
    "language": BenchTask(
        title="language modelling",
        source="texts",
        prepare=language.language,
        metric="token_accuracy",
        told_apart_by=("corpus",),
    ),
    "instructions": BenchTask(
        title="instructions",
        source="instructions",
        prepare=instructions.instructions,
        metric="exact_match",
        told_apart_by=("data",),
    ),
    "code": BenchTask(
        title="functions",
        source="code",
        prepare=code.code,
        metric="pass@1",
        executes_code=True,
        told_apart_by=("data", "problems"),
    ),
    "summarisation": BenchTask(
        title="summaries",
        source="summaries",
        prepare=summarisation.summarisation,
        metric="rougeL",
        told_apart_by=("data",),
    ),
}


def bench_task(settings: Mapping[str, Any], *, seed: int, allow_code_execution: bool = False) -> PreparedTask:
    """The task of an experiment: its `name` ("rotten_tomatoes" where none is given), and the settings of that task.

    Args:
        settings: of the task.
        seed: of what is drawn.
        allow_code_execution: whether code that a model wrote may be run; of no effect where none is.

    Raises:
        ConfigError: there is no such task (the message has the nearest), a setting is unknown, or code would be run
            that may not be.
        DataError: its data are missing.
    """
    rest = dict(settings)
    name = rest.pop("name", "rotten_tomatoes")
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise ConfigError(f"task.name: expected one of the bench's tasks, found {name!r}; nearest: {', '.join(near)}")
    task = TASKS[name]
    known = set(inspect.signature(task.prepare).parameters) - {"seed", "allow_code_execution"}
    unknown = sorted(set(rest) - known)
    if unknown:
        raise ConfigError(
            f"task: {name} has no setting {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}"
        )
    allowed = {"allow_code_execution": allow_code_execution} if task.executes_code else {}
    return task.prepare(seed=seed, **rest, **allowed)
