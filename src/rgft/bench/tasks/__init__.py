"""The tasks of the bench: real labelled texts, split so that no test text was seen in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rgft.bench.tasks import glue, news
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
    """

    title: str
    source: str
    prepare: Callable[..., PreparedTask]


TASKS: Mapping[str, BenchTask] = {
    "rotten_tomatoes": BenchTask(title="Rotten Tomatoes", source="movie reviews", prepare=demo_task),
    "sst2": BenchTask(title="SST-2", source="movie reviews", prepare=glue.sst2),
    "cola": BenchTask(title="CoLA", source="CoLA", prepare=glue.cola),
    "mrpc": BenchTask(title="MRPC", source="MRPC", prepare=glue.mrpc),
    "bbc": BenchTask(title="BBC news", source="BBC", prepare=news.bbc),
    "newsgroups": BenchTask(title="20 Newsgroups", source="newsgroups", prepare=news.newsgroups),
}


def bench_task(settings: Mapping[str, Any], *, seed: int) -> PreparedTask:
    """The task of an experiment: its `name` ("rotten_tomatoes" where none is given), and the settings of that task.

    Raises:
        ConfigError: there is no such task; the message has the nearest.
        DataError: its data are missing.
    """
    rest = dict(settings)
    name = rest.pop("name", "rotten_tomatoes")
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=3) or list(TASKS)
        raise ConfigError(f"task.name: expected one of the bench's tasks, found {name!r}; nearest: {', '.join(near)}")
    return TASKS[name].prepare(seed=seed, **rest)
