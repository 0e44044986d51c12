"""Names and settings of stages, checked against the registries of signals and allocation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rgft.config.problems import expectation, nearest
from rgft.config.sections import StageConfig
from rgft.errors import ConfigError

Role = Literal["signal", "scaling", "mask", "period", "policy"]


def registry(role: Role) -> Mapping[str, type]:
    """Name → class, of what a configuration may name."""
    from rgft import allocation, signals

    if role == "policy":
        # Composed is what scaling, mask and period make; it takes objects, not settings.
        return {name: cls for name, cls in allocation.POLICIES.items() if name != "composed"}
    return {
        "signal": signals.SIGNALS, "scaling": allocation.SCALINGS, "mask": allocation.MASKS,
        "period": allocation.PERIODS,
    }[role]  # fmt: skip


def looks_at_map(role: Role, name: Any) -> bool:
    """Whether the stage's decisions depend on the error map; True for an unknown name."""
    cls = registry(role).get(name) if isinstance(name, str) else None
    return getattr(cls, "needs_map", True) is not False


def settings_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """The settings that a stage's class takes."""
    return inspect.signature(cls).parameters


def check_stage(role: Role, stage: StageConfig) -> None:
    """Checks the name, the settings' names and types, and what the class itself demands of their values.

    Raises:
        ConfigError: with every problem; unknown names with the nearest valid one.
    """
    classes = registry(role)
    if stage.name not in classes:
        raise ConfigError(
            f"{role}: expected the name of a {role}, found {stage.name!r}; {nearest(stage.name, classes)}"
        )
    cls = classes[stage.name]
    known = settings_of(cls)
    problems = [
        f"{role}.{key}: {stage.name!r} has no such setting (found {value!r}); {nearest(key, known)}"
        for key, value in stage.params.items()
        if key not in known
    ]
    problems += [
        f"{role}.{key}: {stage.name!r} needs this setting, and it has no default, found none"
        for key, parameter in known.items()
        if parameter.default is inspect.Parameter.empty and key not in stage.params
    ]
    hints = get_type_hints(cls)
    for key in known.keys() & stage.params.keys():
        problems += _type_problems(f"{role}.{key}", hints.get(key, Any), stage.params[key])
    if problems:
        raise ConfigError(sorted(problems))
    try:
        cls(**stage.params)
    except ConfigError as error:
        raise ConfigError([_with_path(role, stage.name, problem) for problem in error.problems]) from error


def filled(role: Role, stage: StageConfig) -> StageConfig:
    """The stage with the default of every setting that it leaves out."""
    known = settings_of(registry(role)[stage.name])
    defaults = {key: p.default for key, p in known.items() if p.default is not inspect.Parameter.empty}
    return StageConfig(name=stage.name, params={**defaults, **stage.params})


def _type_problems(path: str, hint: Any, value: Any) -> list[str]:
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        expected = " or ".join(dict.fromkeys(expectation(item) for item in error.errors()))
        return [f"{path}: expected {expected}, found {value!r}"]
    return []


def _with_path(role: Role, name: str, problem: str) -> str:
    """A stage's own complaint, under the key that the user wrote."""
    for prefix in (f"{name}.", "mask.", "policy.", "scaling.", "period.", "signal."):
        if problem.startswith(prefix):
            return f"{role}.{problem.removeprefix(prefix)}"
    return f"{role}: {problem}"
