"""A result's figures by name: of the test split, and of what else was evaluated of the run.

Beside the test split's metrics (`accuracy`, `loss`, …): what a run cost (`COSTS`), and, where an experiment asks for
them, `forgetting`, `probe_forgetting`, `similarity_drift`, `weight_change`, the `cosine` to the initial weights of all
of them together, `mean_cosine` over components and that of one with its name before it (`bert.pooler:cosine`), and a
metric on other texts with theirs (`imdb:accuracy`). See docs/measures.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

_Result = Mapping[str, Any]

#: What a run costs: FLOPs as a share of full fine-tuning's, seconds and joules of training, grams of CO2, bytes at the
#: peak, numbers of parameters.
COSTS = frozenset(
    {"flops", "seconds", "joules", "co2_grams", "peak_memory", "updated_per_step", "updated_in_all"}
)  # fmt: skip

#: Of which less is better.
_LOWER = COSTS | {
    "loss", "calibration_error", "perplexity", "mse", "top1_error", "forgetting", "probe_forgetting",
    "similarity_drift", "weight_change",
}  # fmt: skip

#: What is measured on the run or the model itself, and not on examples.
_OF_RUN = COSTS | {"weight_change", "cosine", "mean_cosine"}

#: Name → where the figure lies in a result, if not in the test split's metrics.
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "forgetting": ("measures", "general", "general_loss", "forgetting"),
    "probe_forgetting": ("measures", "general", "probe", "forgetting"),
    "similarity_drift": ("measures", "general", "similarity_drift"),
    "weight_change": ("measures", "weights", "overall", "relative_change"),
    "cosine": ("measures", "weights", "overall", "cosine"),
    "mean_cosine": ("measures", "weights", "components"),
    "flops": ("ledger", "flops", "fraction_of_full"),
    "seconds": ("seconds",),
    "joules": ("ledger", "energy", "joules", "total"),
    "co2_grams": ("ledger", "energy", "co2_grams"),
    "peak_memory": ("ledger", "memory"),
    "updated_per_step": ("ledger", "parameters", "updated_per_step"),
    "updated_in_all": ("ledger", "parameters", "updated_in_all"),
}

#: Name → where a result says on which texts it was measured, if these are not the test split.
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "forgetting": ("measures", "general", "data", "texts"),
    "probe_forgetting": ("measures", "general", "data", "probe"),
    "similarity_drift": ("measures", "general", "data", "texts"),
}


def _mean_cosine(components: _Result) -> float | None:
    """Over the components that have one: of weights that began as zeros there is none, whatever became of them."""
    cosines = [found["cosine"] for found in components.values() if found["cosine"] is not None]
    return mean(cosines) if cosines else None


def _peak_memory(memory: _Result) -> float | None:
    """An accelerator's highest tensor memory, where there is one; else the process's highest resident memory."""
    return memory.get("peak_accelerator_bytes") or memory.get("peak_bytes")


#: Name → what makes the figure of what lies at its place.
_MADE: Mapping[str, Callable[[_Result], float | None]] = {"mean_cosine": _mean_cosine, "peak_memory": _peak_memory}


def is_lower_better(name: str) -> bool:
    """Whether less of a metric is better, on whichever texts."""
    return name.rpartition(":")[2] in _LOWER


def in_words(name: str) -> str:
    """A figure's name for people, with the split that it is of, if it is one's."""
    words = name.replace("_", " ")
    return f"test {words}" if _place(name)[0] == "metrics" else words


def is_of_texts(name: str) -> bool:
    """Whether a figure is measured on examples, which another draw of them would change."""
    return name.rpartition(":")[2] not in _OF_RUN


def figure(result: _Result, name: str) -> float | None:
    """A figure of a run; None: it has none of this name."""
    value = _within(result, _place(name))
    if name in _MADE and value is not None:
        value = _MADE[name](value)
    return None if value is None else float(value)


def is_of(result: _Result, name: str) -> bool:
    """Whether a run was to have a figure: what an experiment did not ask for is missing and not undefined.

    So is what ledgers did not have when the run was made.
    """
    place = _place(name)
    return place[0] not in ("measures", "ledger") or _within(result, place[: 3 if ":" in name else 2]) is not None


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
    for component, found in (_within(result, ("measures", "weights", "components")) or {}).items():
        if found["cosine"] is not None:
            yield f"{component}:cosine"
    yield from (name for name in _BESIDE if figure(result, name) is not None)


def _place(name: str) -> tuple[str, ...]:
    source, _, metric = name.rpartition(":")
    if source and metric == "cosine":
        return ("measures", "weights", "components", source, metric)
    if source:
        return ("measures", "other_domains", source, "metrics", metric)
    return _BESIDE.get(name, ("metrics", "test", name))


def _within(data: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data
