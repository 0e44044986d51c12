"""Validation errors as sentences: full key, what was expected, what was found, and the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rgft.errors import ConfigError


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the valid names nearest to `word`, or all of them when none is near."""
    names = sorted(known)
    return likely(word, names) or (f"known: {', '.join(names)}" if names else "it has none")


def likely(word: str, known: Iterable[str]) -> str:
    """A hint: the valid name nearest to `word`; "" when none is near."""
    names = sorted(known)
    # A beginning is a clearer sign than likeness: `bias` is nearer to `bias_correction` than to `beta`.
    begun = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = begun or get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Every problem in a pydantic error, each once, with the full key path."""
    problems: list[str] = []
    for item in error.errors():
        problems += [problem for problem in _problem(item, root) if problem not in problems]
    return problems


def _problem(item: Mapping[str, Any], root: type[BaseModel]) -> list[str]:
    path = ".".join(str(part) for part in item["loc"])
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.problems
    if item["type"] == "extra_forbidden":
        known = _keys_at(root, item["loc"][:-1])
        return [f"{path}: there is no such setting (found {item['input']!r}); {nearest(str(item['loc'][-1]), known)}"]
    if item["type"] == "missing":
        return [f"{path}: expected a value, found none"]
    if item["type"] == "value_error":
        found = "" if "found" in str(cause) else f", found {item['input']!r}"
        return [f"{path}: {cause}{found}"]
    if item["type"] in ("model_type", "dict_type", "mapping_type"):
        return [
            f"{path}: expected a group of settings ({', '.join(_keys_at(root, item['loc']))}), found {item['input']!r}"
        ]
    hint = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        names = [name.strip(" '") for name in item["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = get_close_matches(item["input"], names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return [f"{path}: expected {expectation(item)}, found {item['input']!r}{hint}"]


def expectation(item: Mapping[str, Any]) -> str:
    """What pydantic would have accepted."""
    message = str(item["msg"]).removeprefix("Input should be ")
    return f"a number {message}" if message.startswith(("greater than", "less than")) else message


def _keys_at(root: type[BaseModel], location: Iterable[Any]) -> list[str]:
    model: Any = root
    for part in location:
        annotation = model.model_fields[part].annotation
        # `StageConfig | None` has a model as one of its arguments.
        candidates = (annotation, *get_args(annotation))
        model = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    return list(model.model_fields)
