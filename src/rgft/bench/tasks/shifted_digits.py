"""Digits that have moved away from a network that reads them: in the pixels, in their places, or in the labels.

Where the error lies differs between the three, as in Lee et al., "Surgical Fine-Tuning Improves Adaptation to
Distribution Shifts", ICLR 2023 (arXiv:2210.11466): what no layer can read any more has to be mended early, labels alone
late. The same network and budget should therefore be spent on different layers.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from rgft.bench.tasks.packaged import efficientnet_lite0
from rgft.bench.tasks.vision import Digit, Digits, digit_splits, digits_task, pixel_loss
from rgft.errors import DataError
from rgft.tasks.base import PreparedTask
from rgft.tasks.image_classification import collate
from rgft.tasks.kept_files import kept_files
from rgft.telemetry.atomic_write import atomic_file

log = logging.getLogger("rgft")

#: How the network that is moved away from learns to read: passes, rows and highest rate of AdamW, the rate falling to 0
#: after a tenth of the steps. It has .98 of the digits right then.
EPOCHS, ROWS, RATE = 4, 32, 1e-3

#: Standard deviation of the noise, of pixels from −1 to 1.
NOISE = 1.5
#: Patches of a side that change places.
PATCHES = 8


def _noisy(image_HW: Tensor, seed: int) -> Tensor:
    return image_HW + NOISE * torch.randn(image_HW.shape, generator=torch.Generator().manual_seed(seed))


def _rearranged(image_HW: Tensor, seed: int) -> Tensor:
    """The same patches in another order, which is one for all images."""
    side = image_HW.shape[0] // PATCHES
    patches = image_HW.view(PATCHES, side, PATCHES, side).transpose(1, 2).reshape(-1, side, side)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(PATCHES))
    return patches[order].view(PATCHES, PATCHES, side, side).transpose(1, 2).reshape(image_HW.shape)


def _as_it_is(image_HW: Tensor, seed: int) -> Tensor:
    return image_HW


#: Shift → what becomes of an image [H, W], given a seed of its own.
SHIFTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "noise": _noisy, "patches": _rearranged, "labels": _as_it_is,
}  # fmt: skip


class ShiftedDigits(Digits):
    """Digits under a shift; of "labels", each counts as the next one, 9 as 0.

    Args:
        rows, side: see `Digits`.
        shift: of `SHIFTS`.
    """

    def __init__(self, rows: Sequence[Digit], *, side: int, shift: str) -> None:
        super().__init__(rows, side=side)
        self._shift = shift

    @property
    def fingerprint(self) -> str:
        """Of pixels as they are in the file, of labels, and of the shift."""
        return hashlib.sha256(f"{super().fingerprint} {self._shift}".encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        # An image's noise is its own, in whatever split and order it comes.
        seed = int.from_bytes(hashlib.sha256(self._rows[index][0]).digest()[:4], "big")
        image_HW = SHIFTS[self._shift](example["pixel_values"][0], seed)
        label = (example["labels"] + 1) % 10 if self._shift == "labels" else example["labels"]
        return {"pixel_values": image_HW.expand(3, -1, -1), "labels": label}


def shifted_digits(*, shift: str, train_size: int, seed: int, side: int = 64) -> PreparedTask:
    """EfficientNet-lite0 that was trained on one half of the digits, on the other half under a shift.

    What it learnt before is no part of a run: all methods start from it. It is trained once and kept (`kept_files`).

    Args:
        shift: "noise" (every pixel is noisy), "patches" (8 × 8 patches in another order) or "labels" (each digit counts
            as the next one).
        train_size: digits under the shift, drawn from 1,500.
        seed: of the draw.
        side: pixels that an image's side is scaled to, a multiple of 8.

    Raises:
        DataError: there is no such shift, or a package is not installed.
    """
    if shift not in SHIFTS or side % PATCHES:
        raise DataError(
            f"shift, side: expected one of {', '.join(SHIFTS)} and a multiple of {PATCHES}, found {shift!r}, {side}"
        )
    model = efficientnet_lite0(classes=10, side=side, seed=0)
    model.load_state_dict(_weights_of_reader(side))
    splits = {**digit_splits(), "train": _halves()[1]}
    return digits_task(
        model, splits, partial(ShiftedDigits, side=side, shift=shift), train_size=train_size, seed=seed
    )  # fmt: skip


def _halves() -> tuple[list[Digit], list[Digit]]:
    """Of the training digits: what the network learns to read by, and what tasks draw from."""
    rows = digit_splits()["train"]
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


@cache
def _weights_of_reader(side: int) -> dict[str, Tensor]:
    """Of the network that reads digits as they are."""
    data = Digits(_halves()[0], side=side)
    recipe = f"{data.fingerprint} {EPOCHS} {ROWS} {RATE}"
    path = kept_files("weights") / f"digits-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        log.info("%s: training the network that reads digits, once", path)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        log.warning("%s: cannot be read (%s), and is made again", path, error)
    model = efficientnet_lite0(classes=10, side=side, seed=0)
    _teach(model, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(model.state_dict(), cast("IO[bytes]", file))
    return model.state_dict()


def _teach(model: nn.Module, data: Digits) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator, steps, step = torch.Generator().manual_seed(0), EPOCHS * (len(data) // ROWS), 0
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(data), generator=generator).tolist()
        for start in range(0, len(data) - ROWS + 1, ROWS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(10.0 * (step + 1) / steps, 1.0 - step / steps)
            batch = collate([data[index] for index in order[start : start + ROWS]])
            pixel_loss(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
