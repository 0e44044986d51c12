"""What the commands are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `rgft train`; see its help."""

    model: str
    data: str
    output: Path
    budget: float
    text: tuple[str, ...]
    label: str
    regression: bool
    validation: str | None
    test: str | None
    lr: float
    epochs: float
    batch_size: int
    max_length: int
    settings: tuple[str, ...]
    checkpoint_every: int
    seed: int
    resume: bool
    overwrite: bool
    dry_run: bool
    quiet: bool
