"""A result's figures by name: of the test split, and of what else was evaluated of the run.

Beside the test split's metrics (`accuracy`, `loss`, …): how many parameters were `updated_per_step` and
`updated_in_all`; and, where an experiment asks for them, `forgetting`, `probe_forgetting`, `similarity_drift`,
`weight_change`, and a metric on other texts with their name before it (`imdb:accuracy`). See docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_Result = Mapping[str, Any]

#: Of which less is better.
_LOWER = frozenset(
    {
        "loss", "calibration_error", "perplexity", "mse", "top1_error", "forgetting", "probe_forgetting",
        "similarity_drift", "weight_change", "updated_per_step", "updated_in_all",
    }
)  # fmt: skip

#: What is measured on the model itself, and not on examples.
_OF_MODEL = frozenset({"weight_change", "updated_per_step", "updated_in_all"})

#: Name → where the figure lies in a result, if not in the test split's metrics.
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "forgetting": ("measures", "general", "general_loss", "forgetting"),
    "probe_forgetting": ("measures", "general", "probe", "forgetting"),
    "similarity_drift": ("measures", "general", "similarity_drift"),
    "weight_change": ("measures", "weights", "overall", "relative_change"),
    "updated_per_step": ("ledger", "parameters", "updated_per_step"),
    "updated_in_all": ("ledger", "parameters", "updated_in_all"),
}


#: Name → where a result says on which texts it was measured, if these are not the test split.
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "forgetting": ("measures", "general", "data", "texts"),
    "probe_forgetting": ("measures", "general", "data", "probe"),
    "similarity_drift": ("measures", "general", "data", "texts"),
}


def is_lower_better(name: str) -> bool:
    """Whether less of a metric is better, on whichever texts."""
    return name.rpartition(":")[2] in _LOWER


def in_words(name: str) -> str:
    """A figure's name for people, with the split that it is of, if it is one's."""
    words = name.replace("_", " ")
    return f"test {words}" if _place(name)[0] == "metrics" else words


def is_of_texts(name: str) -> bool:
    """Whether a figure is measured on examples, which another draw of them would change."""
    return name not in _OF_MODEL


def figure(result: _Result, name: str) -> float | None:
    """A figure of a run; None: it has none of this name."""
    value = _within(result, _place(name))
    return None if value is None else float(value)


def is_of(result: _Result, name: str) -> bool:
    """Whether a run was to have a figure: what an experiment did not ask for is missing and not undefined."""
    place = _place(name)
    return place[0] != "measures" or _within(result, place[: 3 if ":" in name else 2]) is not None


def texts_of(result: _Result, name: str) -> str | None:
    """The fingerprint of the texts beside the task's own that a figure is of; None: of none, or it is not said."""
    source = name.rpartition(":")[0]
    place = ("measures", "other_domains", source, "data") if source else _TEXTS.get(name)
    return None if place is None else _within(result, (*place, "sha256"))


def names(result: _Result) -> Iterator[str]:
    """Of all figures that a run has."""
    yield from result["metrics"].get("test", {})
    for source, found in result.get("measures", {}).get("other_domains", {}).items():
        yield from (f"{source}:{metric}" for metric in found.get("metrics", {}))
    yield from (name for name in _BESIDE if figure(result, name) is not None)


def _place(name: str) -> tuple[str, ...]:
    source, _, metric = name.rpartition(":")
    if source:
        return ("measures", "other_domains", source, "metrics", metric)
    return _BESIDE.get(name, ("metrics", "test", name))


def _within(data: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data
