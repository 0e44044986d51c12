"""Settings of an experiment or a study, from a file in JSON: how it is read, and what its values may be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from rgft.config.problems import problems_of
from rgft.config.sections import Section
from rgft.errors import ConfigError

Checked = TypeVar("Checked", bound=Section)
_NAME = re.compile(r"\w[\w.+]*(-[\w.+]+)*", re.ASCII)


def read_json(path: Path, what: str) -> Any:
    """What a file in JSON holds.

    Args:
        path: of the file.
        what: it holds, in words.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected {what} in JSON: {error}") from error


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """The entries of a file; see `read_json`.

    Raises:
        ConfigError: it cannot be read, or holds no object.
    """
    data = read_json(path, what)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected {what}, an object of keys and values, found {data!r:.60}")
    return data


def checked(kind: type[Checked], data: Mapping[str, Any], where: str, problems: list[str]) -> Checked | None:
    """Settings of a kind; where they cannot be used, None, and what is wrong is added to the problems."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems += [f"{where}: {problem}" for problem in problems_of(error, kind)]
        return None


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("expected a name of letters, digits and . + _ with single - between, since files are named so")
    return value


def as_tuple(value: Any) -> Any:
    """A list of a file, which settings keep as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise ValueError("expected a list")


def _group(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    raise ValueError("expected a group of settings")


def _with_config(settings: dict[str, Any]) -> dict[str, Any]:
    _group(settings.get("config", {}))
    return settings


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("expected each value once")
    return values


#: Of a file or folder, or a part of its name; "--" stands between parts.
Name = Annotated[str, AfterValidator(_name)]
#: Of full fine-tuning's FLOPs.
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, ...], BeforeValidator(as_tuple), AfterValidator(_each_once), Field(min_length=1)]
Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(as_tuple), AfterValidator(_each_once), Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(as_tuple), AfterValidator(_each_once)]
#: Settings by name, of what checks them itself.
Group = Annotated[dict[str, Any], BeforeValidator(_group)]
#: Those of a method, with RGFT's under `config`.
MethodSettings = Annotated[Group, AfterValidator(_with_config)]
