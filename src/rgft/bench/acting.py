"""Whether a run did what its method is for: a policy may decide later than a short run lasts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rgft.bench.methods import METHODS, Method

_FULL = METHODS["full"]


def acted(result: Mapping[str, Any]) -> bool:
    """False: it was full fine-tuning under another name, by what its result says.

    So it is where the method acts by nothing but its policy, each plan has everything on at multiplier 1, no example
    or target was skipped, no iterates were averaged, and the batches cost what they cost in full fine-tuning.
    """
    method = METHODS.get(result["method"])
    if method is None or method is _FULL or _acts_by_itself(method):
        return True
    flops, data = result["ledger"]["flops"], result["ledger"].get("data", {})
    return (
        any(_acts(plan) for plan in result.get("plans") or () if plan["step"] < result["steps"])
        or any(data.get(skipped, 0) for skipped in ("examples_skipped", "targets_skipped"))
        or bool(result.get("config", {}).get("update", {}).get("average_last", 0.0))
        or (result.get("followed") or {}).get("lr_factor", 1.0) != 1.0
        or not math.isclose(flops.get("fraction_of_same_batches", math.nan), 1.0, rel_tol=1e-6)
    )


def _acts_by_itself(method: Method) -> bool:
    """Whether it changes the model, the loss or the optimizer, or does something beside training."""
    return any(getattr(method, part) is not getattr(_FULL, part) for part in ("change", "loss", "optimizer", "begin"))


def _acts(plan: Mapping[str, Any]) -> bool:
    return (
        any(multiplier != 1.0 for multiplier in plan["multipliers"].values())
        or any(period != 1 for period in (plan.get("periods") or {}).values())
        or bool(plan.get("low_rank"))
        or bool(plan.get("cut"))
    )
