"""RGFT: residual-guided fine-tuning."""

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
