"""The tasks of the bench: real data, split so that nothing that is tested on was seen in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rgft.bench.tasks import (
    code,
    glue,
    instructions,
    language,
    movies,
    news,
    shifted_digits,
    summarisation,
    superglue,
    vision,
)
from rgft.bench.tasks.corpora import corpora
from rgft.errors import ConfigError
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import demo_task

__all__ = ["TASKS", "BenchTask", "bench_task"]


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """A task of the bench.

    What depends on a task's settings takes them with the defaults of `prepare` (see `with_defaults`).

    Attributes:
        title: in tables.
        prepare: settings and seed → model, data and loss.
        draws_on: settings → what its examples come from, by names that `corpora` knows.
        metric: settings → the one that tables show beside the loss.
        told_apart_by: settings that make it another task, with data of its own.
        executes_code: whether it runs code that a model wrote, if whoever runs the bench allows it.
        is_judged: whether its score is of what a model writes, which is seen on the test split alone.
    """

    title: str
    prepare: Callable[..., PreparedTask]
    draws_on: Callable[[Mapping[str, Any]], Sequence[str | None]]
    metric: Callable[[Mapping[str, Any]], str] = lambda _: "accuracy"
    told_apart_by: tuple[str, ...] = ()
    executes_code: bool = False
    is_judged: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its settings, each with its default; None where it has none."""
        known = inspect.signature(self.prepare).parameters
        return {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in known.items()
            if name not in ("seed", "allow_code_execution")
        }

    def with_defaults(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """All settings of a run of it."""
        return {**self.settings, **{name: value for name, value in given.items() if name != "name"}}

    def variant(self, given: Mapping[str, Any]) -> str:
        """Which of its tasks it is, in words; empty where it is one."""
        settings = self.with_defaults(given)
        return ", ".join(str(settings[name]) for name in self.told_apart_by if settings[name] is not None)

    def score(self, given: Mapping[str, Any]) -> str:
        """Its metric beside the loss."""
        return self.metric(self.with_defaults(given))

    def corpora(self, given: Mapping[str, Any]) -> frozenset[str]:
        """Where its examples come from: tasks with a corpus in common are not independent."""
        return corpora(*self.draws_on(self.with_defaults(given)))


def _text(title: str, name: str, prepare: Callable[..., PreparedTask], metric: str = "accuracy") -> BenchTask:
    return BenchTask(title=title, prepare=prepare, draws_on=lambda _: (name,), metric=lambda _: metric)


TASKS: Mapping[str, BenchTask] = {
    "rotten_tomatoes": _text("Rotten Tomatoes", "rotten_tomatoes", demo_task),
    "sst2": _text("SST-2", "sst2", glue.sst2),
    "cola": _text("CoLA", "cola", glue.cola, "matthews"),
    "mrpc": _text("MRPC", "mrpc", glue.mrpc),
    "bbc": _text("BBC news", "bbc", news.bbc),
    "newsgroups": _text("20 Newsgroups", "newsgroups", news.newsgroups),
    "imdb": _text("IMDB", "imdb", movies.imdb),
    "superglue": BenchTask(
        title="GLUE and SuperGLUE",
        prepare=superglue.superglue,
        draws_on=lambda settings: (settings["task"],),
        metric=lambda settings: superglue.SOURCES[settings["task"]].primary,
        told_apart_by=("task",),
    ),
    "digits": BenchTask(title="MNIST digits", prepare=vision.digits, draws_on=lambda _: ("digits",)),
    "shifted_digits": BenchTask(
        title="MNIST digits, shifted",
        prepare=shifted_digits.shifted_digits,
        draws_on=lambda _: ("digits",),
        told_apart_by=("shift",),
    ),
    "images": BenchTask(
        title="images",
        prepare=vision.images,
        draws_on=lambda settings: (settings["data"], settings["validation"], settings["test"]),
        told_apart_by=("data",),
    ),
    "language": BenchTask(
        title="language modelling",
        prepare=language.language,
        draws_on=lambda settings: (settings["corpus"], settings["validation"], settings["test"]),
        metric=lambda _: "token_accuracy",
        told_apart_by=("corpus",),
    ),
    "instructions": BenchTask(
        title="instructions",
        prepare=instructions.instructions,
        draws_on=lambda settings: (settings["data"], settings["validation"], settings["test"]),
        metric=lambda _: "exact_match",
        is_judged=True,
        told_apart_by=("data",),
    ),
    "code": BenchTask(
        title="functions",
        prepare=code.code,
        draws_on=lambda settings: (settings["data"] or "python", settings["problems"]),  # those of the task `language`
        metric=lambda settings: f"pass@{min(settings['k'])}",
        executes_code=True,
        is_judged=True,
        told_apart_by=("data", "problems", "train_problems"),
    ),
    "summarisation": BenchTask(
        title="summaries",
        prepare=summarisation.summarisation,
        draws_on=lambda settings: (settings["data"], settings["validation"], settings["test"]),
        metric=lambda _: "rougeL",
        is_judged=True,
        told_apart_by=("data",),
    ),
}


def known_task(settings: Mapping[str, Any]) -> BenchTask:
    """The task that settings name: "rotten_tomatoes" where they name none.

    Raises:
        ConfigError: there is no such task; the message has the nearest.
    """
    name = settings.get("name", "rotten_tomatoes")
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise ConfigError(f"task.name: expected one of the bench's tasks, found {name!r}; nearest: {', '.join(near)}")
    return TASKS[name]


def bench_task(settings: Mapping[str, Any], *, seed: int, allow_code_execution: bool = False) -> PreparedTask:
    """The task of an experiment, prepared.

    Args:
        settings: of the task, its name among them (see `known_task`).
        seed: of what is drawn.
        allow_code_execution: whether code that a model wrote may be run; of no effect where none is.

    Raises:
        ConfigError: there is no such task (the message has the nearest), a setting is unknown, or code would be run
            that may not be.
        DataError: its data are missing.
    """
    task = known_task(settings)
    rest = {key: value for key, value in settings.items() if key != "name"}
    known = task.settings
    unknown = sorted(set(rest) - set(known))
    if unknown:
        raise ConfigError(
            f"task: {settings.get('name', 'rotten_tomatoes')} has no setting {', '.join(map(repr, unknown))}; known: "
            f"{', '.join(sorted(known))}"
        )
    allowed = {"allow_code_execution": allow_code_execution} if task.executes_code else {}
    return task.prepare(seed=seed, **rest, **allowed)
