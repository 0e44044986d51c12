"""Deciding: from an error map to an update plan. Pure functions; nothing here touches a tensor."""

from rgft.allocation.base import Mask, Period, Policy, Scaling, Situation
from rgft.allocation.registry import (
    MASKS,
    PERIODS,
    POLICIES,
    SCALINGS,
    make_mask,
    make_period,
    make_policy,
    make_scaling,
)
from rgft.allocation.selection import depends_on_map

__all__ = [
    "MASKS",
    "PERIODS",
    "POLICIES",
    "SCALINGS",
    "Mask",
    "Period",
    "Policy",
    "Scaling",
    "Situation",
    "depends_on_map",
    "make_mask",
    "make_period",
    "make_policy",
    "make_scaling",
]
