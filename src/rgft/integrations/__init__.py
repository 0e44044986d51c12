"""Adapters to training frameworks; the only home of their names beside tasks, bench and cli."""

from rgft.integrations.hf_callback import RGFTCallback
from rgft.integrations.hf_trainer import enable

__all__ = ["RGFTCallback", "enable"]
