"""What a Trainer's logs and checkpoints get of the guide."""

from __future__ import annotations

from pathlib import Path
from typing import IO, cast

import torch

from rgft.errors import AttachError
from rgft.guide import Guide
from rgft.telemetry.atomic_write import atomic_file

STATE_FILE = "rgft_state.pt"


def log_entries(guide: Guide) -> dict[str, float]:
    """What is logged beside loss and learning rate.

    Returns:
        rgft/budget_spent: share of what the run may spend; rgft/flops_fraction: share of full fine-tuning's FLOPs;
        rgft/active_components: number on in this step; rgft/cut: depth below which nothing is trained;
        rgft/captured_share: share of the error map in what is on (left out until something was measured).
    """
    entries = {
        "rgft/budget_spent": guide.budget_spent,
        "rgft/flops_fraction": guide.flops_fraction,
        "rgft/active_components": float(len(guide.active)),
        "rgft/cut": float(guide.plan.cut),
    }
    captured = guide.error_map.captured(guide.active)
    return entries if captured is None else {**entries, "rgft/captured_share": float(captured)}


def save_state(guide: Guide, folder: Path | str) -> None:
    """Writes the guide's state into a checkpoint folder, atomically.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    with atomic_file(Path(folder) / STATE_FILE) as file:
        torch.save(guide.state_dict(), cast("IO[bytes]", file))


def load_state(guide: Guide, folder: Path | str) -> None:
    """Restores what `save_state` wrote.

    Raises:
        AttachError: the folder has none.
        ConfigError: it was made with another configuration.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise AttachError(
            f"{path} is missing: the checkpoint was written without RGFT, or its writing was cut short. Resume from "
            "another checkpoint, or start from this one's weights without resume_from_checkpoint"
        )
    guide.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
