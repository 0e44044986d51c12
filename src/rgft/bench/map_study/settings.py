"""What a map study runs: a task, a short training run, and the signals whose maps are held against measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from rgft.bench.settings_file import read_settings
from rgft.components import Granularity
from rgft.errors import ConfigError
from rgft.signals.registry import SIGNALS, make

#: Label of a signal in results → its name and parameters.
DEFAULT_SIGNALS: Mapping[str, Mapping[str, Any]] = {
    "generalising_decrease": {"name": "generalising_decrease"},
    "grad_norm_rms": {"name": "grad_norm", "p": 2, "normalise": "rms"},
    "grad_norm_raw": {"name": "grad_norm", "p": 2, "normalise": "raw"},
    "residual_dot": {"name": "residual_dot", "mode": "abs"},
    "taylor": {"name": "taylor"},
    "act_x_grad": {"name": "act_x_grad"},
    "suppression": {"name": "suppression"},
    "delta": {"name": "delta"},
    "weight_magnitude": {"name": "weight_magnitude"},
    "random": {"name": "random"},
}


@dataclass(frozen=True, kw_only=True)
class MapStudy:
    """One study; a run of it per seed.

    Attributes:
        name: of the result folder.
        task: settings of a task of the bench.
        seeds: of the task's draw, the new classifier, the order of batches and dropout.
        granularity: of the components.
        signals: label → name and parameters; "predicted_decrease" comes with "generalising_decrease".
        steps: of the training run, with everything on; its rate falls linearly to zero.
        alone_steps: of the runs in which one component trains beside the classifier, at a constant rate.
        batch_size: of all of them.
        lr: of AdamW; a classifier's is `classifier_lr_multiplier` times that.
        classifier_lr_multiplier: see `lr`.
        weight_decay: decoupled.
        looks: how often the map is taken: before the first step, after the last, and evenly between.
        probe_size: examples of a look at each signal; they are of the training set, as probes are, and not trained on.
        examples: of the validation split, that harm and gain are measured on.
        eval_batch_size: of these.
    """

    name: str
    task: Mapping[str, Any]
    seeds: tuple[int, ...]
    granularity: Granularity = "block"
    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: dict(DEFAULT_SIGNALS))
    steps: int = 40
    alone_steps: int = 8
    batch_size: int = 16
    lr: float = 2e-4
    classifier_lr_multiplier: float = 10.0
    weight_decay: float = 0.01
    looks: int = 5
    probe_size: int = 32
    examples: int = 192
    eval_batch_size: int = 64

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected {what}, found {getattr(self, name)!r}"
            for name, what, ok in (
                ("seeds", "at least one seed, each once", len(set(self.seeds)) == len(self.seeds) > 0),
                (
                    "granularity",
                    f"one of {', '.join(get_args(Granularity))}",
                    self.granularity in get_args(Granularity),
                ),
                ("signals", "at least one signal", bool(self.signals)),
                ("steps", "an integer >= 1", self.steps >= 1),
                ("alone_steps", "an integer >= 0 (0: no component is trained alone)", self.alone_steps >= 0),
                ("batch_size", "an integer >= 1", self.batch_size >= 1),
                ("lr", "a number > 0", self.lr > 0),
                ("looks", "an integer from 2 to steps + 1", 2 <= self.looks <= self.steps + 1),
                ("probe_size", "an integer >= 2", self.probe_size >= 2),
                ("examples", "an integer >= 2", self.examples >= 2),
            )
            if not ok
        ]
        for label, settings in self.signals.items():
            params = {key: value for key, value in settings.items() if key != "name"}
            try:
                signal = make(str(settings.get("name", label)), **params)
            except ConfigError as error:
                problems += [f"signals.{label}: {problem}" for problem in error.problems]
            else:
                if label != signal.name and label in SIGNALS:
                    problems.append(f"signals.{label}: expected that signal, or another label; found {signal.name!r}")
        if problems:
            raise ConfigError(problems)

    @property
    def look_steps(self) -> tuple[int, ...]:
        """Steps made when the map is taken."""
        return tuple(round(place * self.steps / (self.looks - 1)) for place in range(self.looks))

    @classmethod
    def load(cls, path: Path) -> MapStudy:
        """Reads a study's file.

        Raises:
            ConfigError: the file cannot be used; all problems at once.
        """
        known = {item.name: item for item in fields(cls)}
        needed = {n for n, item in known.items() if item.default is MISSING and item.default_factory is MISSING}
        data = read_settings(path, "a map study")
        problems = [f"{path}: unknown key {key!r}; known: {', '.join(known)}" for key in sorted(set(data) - set(known))]
        problems += [f"{path}: the key {key!r} is missing" for key in sorted(needed - set(data))]
        if problems:
            raise ConfigError(problems)
        return cls(**{**data, "seeds": tuple(data["seeds"])})
