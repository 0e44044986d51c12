"""What is left of RGFT without what it finds out on the way: its last plan from the start, its mean learning rate.

Both need a run of RGFT with the same seed and learning rate. Its FLOPs are not in their budgets (they know beforehand
what RGFT had to find out): they are in the result, as `followed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rgft.bench.methods.base import Followed, Method
from rgft.bench.methods.own import RGFT_REVISION
from rgft.errors import ConfigError, DataError
from rgft.plan import UpdatePlan


def last_plan(result: Mapping[str, Any], settings: Mapping[str, Any]) -> Followed:
    """The plan that was in force when the run ended, throughout."""
    if not result["plans"]:
        raise DataError("rgft_static: expected a run of RGFT that decided something, found one without plans")
    return Followed(config={"policy": {"name": "static", "plan": result["plans"][-1]}})


def mean_rate(result: Mapping[str, Any], settings: Mapping[str, Any]) -> Followed:
    """The mean of all multipliers: over steps, and over the components that were on (or all: what is off counts 0).

    Before the first plan everything is on at multiplier 1.
    """
    among = settings.get("among", "on")
    if among not in ("on", "all"):
        raise ConfigError(f"settings.among: expected 'on' or 'all', found {among!r}")
    plans = [UpdatePlan.from_dict(plan) for plan in result["plans"]]
    bounds = [*(plan.step for plan in plans), result["steps"]]
    total = float(bounds[0])
    for plan, (start, stop) in zip(plans, pairwise(bounds), strict=True):
        rates = [f for f in plan.multipliers.values() if f > 0.0 or among == "all"]
        total += (stop - start) * sum(rates) / len(rates)
    return Followed(lr_factor=total / result["steps"])


METHODS = (
    Method(
        name="rgft_static", title="RGFT's last plan from the start", follows=last_plan,
        cost="as RGFT, without probes and measuring; the run that found the plan is not counted",
        revision=RGFT_REVISION,
    ),
    Method(
        name="uniform_rate", title="everything at RGFT's mean learning rate", follows=mean_rate,
        config={"preset": "full"}, cost="nothing; the run that found the rate is not counted",
        revision=RGFT_REVISION,
    ),
)  # fmt: skip
