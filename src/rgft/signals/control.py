"""Controls: scores that know nothing, to tell what an allocation owes to its signal."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from rgft.signals.base import Probe, Signal


@dataclass(frozen=True, kw_only=True)
class Random(Signal):
    """Independent uniform scores in [0, 1), a function of the seed and the probe's step alone.

    The global random state is neither read nor moved, so ranks and resumed runs draw alike.

    Attributes:
        seed: of the scores.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def measure(self, probe: Probe) -> dict[str, float]:
        # Hashed, because neighbouring seeds of one generator are related and seed + step would repeat.
        digest = hashlib.sha256(f"{self.seed}:{probe.step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        draws = torch.rand(len(probe.partition), generator=generator, dtype=torch.float64).tolist()
        return dict(zip(probe.partition.names, draws, strict=True))


@dataclass(frozen=True, kw_only=True)
class Uniform(Signal):
    """1 for every component."""

    name: ClassVar[str] = "uniform"

    def measure(self, probe: Probe) -> dict[str, float]:
        return dict.fromkeys(probe.partition.names, 1.0)
