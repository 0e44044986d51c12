"""What is left of RGFT without what it finds out on the way: its last plan from the start, with its multipliers
or one rate for all.

Both need a run of RGFT with the same seed and learning rate. Its FLOPs are not in their budgets (they know beforehand
what RGFT had to find out): they are in the result, as `followed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from rgft.bench.methods.base import Followed, Method
from rgft.bench.methods.own import RGFT_REVISION
from rgft.errors import DataError
from rgft.plan import UpdatePlan


def last_plan(result: Mapping[str, Any], settings: Mapping[str, Any]) -> Followed:
    """The plan that was in force when the run ended, throughout."""
    return _throughout(_plans(result)[-1])


def mean_rate(result: Mapping[str, Any], settings: Mapping[str, Any]) -> Followed:
    """What that plan trains, at one rate: the mean of all multipliers, over steps and over what was on.

    Before the first plan everything is on at multiplier 1.
    """
    plans = _plans(result)
    bounds = [*(plan.step for plan in plans), result["steps"]]
    total = float(bounds[0])
    for plan, (start, stop) in zip(plans, pairwise(bounds), strict=True):
        total += (stop - start) * fmean(rate for rate in plan.multipliers.values() if rate > 0.0)
    alike = {name: float(rate > 0.0) for name, rate in plans[-1].multipliers.items()}
    return _throughout(replace(plans[-1], multipliers=alike), lr_factor=total / result["steps"])


def _plans(result: Mapping[str, Any]) -> list[UpdatePlan]:
    if not result["plans"]:
        raise DataError("expected a run of RGFT that decided something, found one without plans")
    return [UpdatePlan.from_dict(plan) for plan in result["plans"]]


def _throughout(plan: UpdatePlan, *, lr_factor: float = 1.0) -> Followed:
    return Followed(config={"policy": {"name": "static", "plan": plan.to_dict()}}, lr_factor=lr_factor)


#: Where the run of RGFT is read from, or the settings that it is made with.
_OF_RGFT = {"result": None, "rgft": None}

METHODS = (
    Method(
        name="rgft_static", title="RGFT's last plan from the start", follows=last_plan, settings=_OF_RGFT,
        cost="as RGFT, without probes and measuring; the run that found the plan is not counted",
        revision=RGFT_REVISION,
    ),
    Method(
        name="uniform_rate", title="RGFT's last cut from the start, all at its mean learning rate", follows=mean_rate,
        cost="as RGFT, without probes and measuring; the run that found the rate is not counted", settings=_OF_RGFT,
        revision=RGFT_REVISION + 1,
    ),
)  # fmt: skip
