"""RGFT: residual-guided fine-tuning."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgft.allocation import Policy, Situation
    from rgft.components import Component, ParameterSlice, Partition
    from rgft.config import Config
    from rgft.cost import CostModel
    from rgft.error_map import ErrorMap
    from rgft.errors import RGFTError, RGFTWarning
    from rgft.guide import Guide
    from rgft.partition import partition
    from rgft.plan import Budget, RunPlan, UpdatePlan
    from rgft.signals import Signal

__version__ = "0.1.0.dev0"

__all__ = [
    "Budget", "Component", "Config", "CostModel", "ErrorMap", "Guide", "ParameterSlice", "Partition", "Policy",
    "RGFTError", "RGFTWarning", "RunPlan", "Signal", "Situation", "UpdatePlan", "partition",
]  # fmt: skip

# Names are imported when first used: torch takes seconds, and `rgft --help` needs none of it.
_HOMES = {
    "Policy": "allocation", "Situation": "allocation", "Component": "components", "ParameterSlice": "components",
    "Partition": "components", "Config": "config", "CostModel": "cost", "ErrorMap": "error_map", "RGFTError": "errors",
    "RGFTWarning": "errors", "Guide": "guide", "partition": "partition", "Budget": "plan", "RunPlan": "plan",
    "UpdatePlan": "plan", "Signal": "signals",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rgft' has no attribute {name!r}")
    value = getattr(import_module(f"rgft.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`rgft.partition` is the function: importing the module of that name must not put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "partition" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
