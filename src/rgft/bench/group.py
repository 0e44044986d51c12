"""A comparison: what its runs have in common, and what else it is told apart from others by."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rgft.bench.tasks import TASKS
from rgft.errors import DataError
from rgft.run_settings import Settings

#: Settings of a run that change what it costs, not what it learns; a learning rate is the contender's own.
_OF_NO_EFFECT = frozenset({"lr", "device", "checkpoint_every", "eval_batch_size"})


@dataclass(frozen=True, kw_only=True)
class Group:
    """A comparison: runs on one task, with one model, data and length.

    Attributes:
        task: its name.
        title: in words.
        fixes_cuts: whether these are cuts fixed by hand, beside RGFT's own.
        metric: what tables show beside the loss.
        corpora: where its examples come from: tasks with one in common are not independent.
        settings: of the task, of its runs and of how rates were chosen, defaults included: names and values as texts.
    """

    task: str
    title: str
    fixes_cuts: bool
    metric: str
    corpora: frozenset[str]
    settings: tuple[tuple[str, str], ...]

    @property
    def heading(self) -> str:
        """Its title, which it may have in common with that of cuts fixed by hand, told apart from theirs."""
        return f"{self.title}, the cut fixed by hand" if self.fixes_cuts else self.title

    @property
    def chosen_by(self) -> str:
        """By what learning rates were chosen: "loss" or "score" of validation data."""
        return dict(self.settings)["chosen_by"]

    def is_chosen_otherwise(self, other: Group) -> bool:
        """Whether the two are the same but for what rates were chosen by."""
        return self.chosen_by != other.chosen_by and self == replace(
            other, title=self.title, settings=_with(other.settings, chosen_by=self.chosen_by)
        )

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Group:
        """The comparison that a result belongs to.

        Raises:
            DataError: its task is none of the bench's.
        """
        given, name = result["task"], result["task"].get("name", "rotten_tomatoes")
        if name not in TASKS:
            raise DataError(f"expected a result of one of the bench's tasks, found {name!r}; move it elsewhere")
        task = TASKS[name]
        settings = task.with_defaults(given)
        run = {**{item.name: item.default for item in fields(Settings)}, **result["run"]}
        shared = {
            "chosen_by": result.get("chosen_by", "loss"),
            **settings,
            **{key: value for key, value in run.items() if key not in _OF_NO_EFFECT},
        }
        variant = task.variant(given)
        epochs = "one epoch" if run["epochs"] == 1 else f"{run['epochs']:g} epochs"
        size = f"{given['train_size']:,}" if given.get("train_size") is not None else "all"
        cut = f" of {given['tokens']} tokens" if "tokens" in given else ""
        by_score = ", rates by score" if shared["chosen_by"] == "score" else ""
        model = f" {given['model']}," if given.get("model") not in (None, task.settings.get("model")) else ""
        return cls(
            task=name, fixes_cuts=result["method"] == "cut", metric=task.metric(settings), corpora=task.corpora(given),
            title=f"{task.title}{f' ({variant})' if variant else ''},{model} {size} examples{cut}, {epochs}{by_score}",
            settings=tuple(sorted((key, canonical(value)) for key, value in shared.items())),
        )  # fmt: skip


def _with(settings: Iterable[tuple[str, str]], **changes: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({**dict(settings), **changes}.items()))


def canonical(value: Any) -> str:
    """A setting as a text: the same for equal ones, whatever the order of keys, and of 3 and 3.0."""
    if isinstance(value, str):
        return value
    return json.dumps(_whole_numbers(value), sort_keys=True)


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def told_apart(groups: Collection[Group]) -> dict[Group, Group]:
    """The same groups with titles of their own: equal ones are followed by the settings that differ."""
    found: dict[Group, Group] = {}
    for group in groups:
        alike = [dict(other.settings) for other in groups if other.title == group.title]
        differing = [
            f"{key} {value}" for key, value in group.settings
            if len({other.get(key) for other in alike}) > 1
        ]  # fmt: skip
        found[group] = replace(group, title=", ".join([group.title, *differing]))
    return found
