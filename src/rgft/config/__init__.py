"""The configuration: one validated tree for Python, file and flags.

Reading order: `sections` (the groups of settings) · `tree` (`Config`) · `presets` · `stages` (names and settings of
signals, scalings, masks, periods, policies) · `overrides` (`key.path=value`) · `problems` (all errors at once) ·
`effects` (settings without effect).
"""

from rgft.config.overrides import apply_overrides
from rgft.config.presets import PRESETS
from rgft.config.sections import (
    EnergyConfig,
    ErrorMapConfig,
    ExamplesConfig,
    ExecutionConfig,
    ProbeConfig,
    StabilityConfig,
    StageConfig,
    UpdateConfig,
)
from rgft.config.tree import CONFIG_FILE, Config, checked

__all__ = [
    "CONFIG_FILE", "PRESETS", "Config", "EnergyConfig", "ErrorMapConfig", "ExamplesConfig", "ExecutionConfig",
    "ProbeConfig",
    "StabilityConfig", "StageConfig", "UpdateConfig", "apply_overrides",
    "checked",
]  # fmt: skip
