"""Whether what runs cost can be held against each other: FLOPs can, anywhere; seconds only of runs made alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from rgft.bench.figures import COSTS
from rgft.bench.finals import Finals
from rgft.bench.group import canonical
from rgft.errors import ConfigError

#: What a frontier can be drawn against.
Cost = Literal["flops", "seconds", "joules", "co2_grams", "peak_memory"]

_ENERGY = frozenset({"joules", "co2_grams"})
_TIMED = _ENERGY | {"seconds"}

BESIDE_OTHERS = "run with others beside it"
#: What a run frees stays with its process, so that the highest resident memory of one is mostly of those before it.
RESIDENT = "resident memory, with what runs before it left"
_Result = Mapping[str, Any]


def cost_of(name: str) -> Cost:
    """The cost of this name.

    Raises:
        ConfigError: there is none.
    """
    for cost in get_args(Cost):
        if cost == name:
            return cost
    raise ConfigError(f"against: expected one of {', '.join(get_args(Cost))}, found {name!r}")


def unsound(result: _Result, cost: str) -> str:
    """Why a cost of a run says nothing, in words; empty: it does.

    The bench made one run at a time before its results said how many.
    """
    if cost in _TIMED and result.get("jobs", 1) != 1:
        return BESIDE_OTHERS
    if cost == "peak_memory" and not result["ledger"]["memory"].get("peak_accelerator_bytes"):
        return RESIDENT
    return ""


def circumstances(result: _Result, cost: str) -> str:
    """What must be the same for a cost of two runs to be comparable: what computed, and how energy is known."""
    environment, device = result.get("environment", {}), result.get("device", "cpu")
    if cost == "peak_memory":
        return canonical([device, environment.get("accelerators")])
    if cost not in _TIMED:
        return ""
    threads = environment.get("torch", {}).get("threads")
    machine = [device, environment.get("cpu"), environment.get("accelerators"), threads]
    energy = result["ledger"].get("energy") or {} if cost in _ENERGY else {}
    return canonical([*machine, energy.get("source"), energy.get("carbon_intensity") if cost == "co2_grams" else None])


def doubt(method: Finals, baseline: Finals, metric: str) -> str:
    """Why two contenders' costs cannot decide anything, in words; empty: they can, or the metric is no cost."""
    if metric not in COSTS:
        return ""
    results = _paired(method, baseline, metric)
    reasons = sorted({reason for result in results if (reason := unsound(result, metric))})
    if len({circumstances(result, metric) for result in results}) > 1:
        reasons.append("on different machines" if metric not in _ENERGY else "on different machines or meters")
    return ", ".join(reasons)


def source(method: Finals, baseline: Finals, metric: str) -> str:
    """How energy is known, as results say: "measured" by counters, "estimated" from seconds; empty: no energy."""
    if metric not in _ENERGY:
        return ""
    known = {result["ledger"]["energy"].get("source") for result in _paired(method, baseline, metric)}
    return " and ".join(sorted(filter(None, known)))


def _paired(method: Finals, baseline: Finals, metric: str) -> list[_Result]:
    """The runs of both that a comparison pairs."""
    common = set(method.metric(metric)) & set(baseline.metric(metric))
    return [finals.by_seed[seed] for finals in (method, baseline) for seed in sorted(common)]
