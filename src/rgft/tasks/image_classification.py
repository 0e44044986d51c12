"""Image classification: from folders, parquet files or hub names to model, data and loss."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rgft.errors import DataError
from rgft.tasks import metrics
from rgft.tasks.base import PreparedTask
from rgft.tasks.image_folders import holds_splits, read_folder, split_folder
from rgft.tasks.image_tables import read_table
from rgft.tasks.images import LabelledImage, check, repeated
from rgft.tasks.models import load_image_classifier, load_image_processor
from rgft.tasks.split import stratified

log = logging.getLogger("rgft")

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"


def image_classification(
    *, model: str, train: str, validation: str | None = None, test: str | None = None, held_out: float = 0.1,
    seed: int = 0, image: str = IMAGE_COLUMN, label: str = LABEL_COLUMN, flip: bool = True,
    split_seed: int | None = None, without_copies: bool = False,
) -> PreparedTask:  # fmt: skip
    """Prepares classification of images. All are read once, to be sure that they can be; none is kept decoded.

    Args:
        model: hub name or folder of a pre-trained model with its image processor.
        train, validation, test: a folder with a folder of images per class, a `.parquet` file or a hub name. A folder
            that holds `train` and other splits gives those splits, where they are not given. Without validation,
            `held_out` of the training images are held out, stratified by class, equal files staying on one side.
        held_out: share of the training images for validation where none is given.
        seed: of the split and of new weights.
        image, label: columns, of sources that are no folders.
        flip: whether training images are mirrored left to right, each time with probability ½.
        split_seed: of the split; None: `seed`.
        without_copies: whether an exact copy of an image is left out, the one that is tested on (else validated on)
            being kept; else copies are counted in the log.

    Raises:
        DataError: a source, an image, a label or the model cannot be used.
    """
    sources = _sources(train, validation, test)
    if (image, label) != (IMAGE_COLUMN, LABEL_COLUMN) and all(isinstance(source, Path) for source in sources.values()):
        raise DataError(
            f"image and label: expected only with sources that have columns, found {image!r} and {label!r} with the "
            f"folder {train}; the classes of a folder are the names of the folders in it"
        )
    images: dict[str, list[LabelledImage]] = {}
    order: tuple[str, ...] = ()
    for split, source in sources.items():
        if isinstance(source, Path):
            images[split] = read_folder(source)
            continue
        images[split], names = read_table(source, image=image, label=label, split=split)
        order = order or names
    names = _classes(train, images["train"], order)
    for split, some in images.items():
        _require_known(some, names, split)
    digests = {split: check(some) for split, some in images.items()}
    if without_copies:
        images, digests = _without_copies(images, digests)
    else:
        _report_copies(digests)
    if "validation" not in images:
        chosen = seed if split_seed is None else split_seed
        parts = _held_out(images["train"], digests["train"], names, held_out, chosen)
        for split, pairs in zip(("train", "validation"), parts, strict=True):
            images[split], digests[split] = [image for image, _ in pairs], [digest for _, digest in pairs]
    processor = load_image_processor(model)
    network = load_image_classifier(model, names=names, seed=seed)
    data = {
        split: Images(some, names, processor, mirrors=flip and split == "train", digests=digests[split])
        for split, some in images.items()
    }
    _require_fit(network, data["train"], model)
    return PreparedTask(
        model=network, processor=processor, train=data["train"], validation=data["validation"], test=data.get("test"),
        collate=collate, loss=image_loss, metric=partial(metrics.OfWholeSplit, metrics.classification),
        label_names=names,
    )  # fmt: skip


class Images:
    """A data set that decodes an image when it is asked for it; see `SizedDataset` for variants.

    Args:
        images: what it holds.
        names: of the classes, by label.
        processor: image → `pixel_values` [1, C, H, W].
        mirrors: whether each image's variant 1 is its mirror image, left to right.
        digests: SHA-256 of each image's bytes, where they are known; None: files are read again for `fingerprint`.
    """

    is_uniform = True  # or an error

    def __init__(
        self, images: Sequence[LabelledImage], names: Sequence[str], processor: Any, *, mirrors: bool,
        digests: Sequence[bytes] | None = None,
    ) -> None:  # fmt: skip
        self._images, self._processor, self._digests = images, processor, digests
        self._labels = {name: label for label, name in enumerate(names)}
        self._shape: torch.Size | None = None
        self.variants = 2 if mirrors else 1

    @property
    def fingerprint(self) -> str:
        """Of the images' files, their labels and how they are prepared."""
        digest = hashlib.sha256(repr((self.variants, self._labels, self._processor.to_dict())).encode())
        known = self._digests or (hashlib.sha256(image.content()).digest() for image in self._images)
        for image, of_content in zip(self._images, known, strict=True):
            digest.update(of_content + image.label.encode())
        return digest.hexdigest()

    def subset(self, places: Sequence[int]) -> Images:
        """Some of the images, in the given order."""
        return Images(
            [self._images[place] for place in places], tuple(self._labels), self._processor, mirrors=self.variants > 1,
            digests=None if self._digests is None else [self._digests[place] for place in places],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import ImageOps

        variant, place = divmod(index, len(self))
        if not 0 <= variant < self.variants:
            raise IndexError(f"expected a position below {self.variants * len(self)}, found {index}")
        image = self._images[place]
        pixels = image.pixels()
        if variant:
            pixels = ImageOps.mirror(pixels)
        values = self._processor(pixels, return_tensors="pt")["pixel_values"][0]
        first = self._shape = self._shape or values.shape
        if values.shape != first:
            raise DataError(
                f"{image.where}: expected an image processor that makes all images of one size, found "
                f"{_written(values.shape)} after {_written(first)}; in its preprocessor_config.json, give a fixed "
                "height and width, or let it crop"
            )
        return {"pixel_values": values, "labels": self._labels[image.label]}


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`pixel_values` [B, C, H, W] and `labels` [B]."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def image_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each example, [B].

    Raises:
        DataError: a batch of one image in training, in which BatchNorm finds a single value per channel.
    """
    try:
        logits = model(pixel_values=batch["pixel_values"]).logits
    except ValueError as error:
        if len(batch["labels"]) > 1 or not model.training:
            raise
        raise DataError(
            f"a batch of one image cannot be trained on: {error}. Choose a batch size that leaves no single image at "
            "the end of an epoch, or larger images"
        ) from error
    return functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def _sources(train: str, validation: str | None, test: str | None) -> dict[str, Path | str]:
    """Where each split comes from: a folder of class folders, or a name of a table."""
    sources: dict[str, Path | str] = {}
    for split, given in (("train", train), ("validation", validation), ("test", test)):
        path = Path(given or train).expanduser()
        if path.suffix == ".parquet" or not (path.exists() or (given or train).startswith((".", "/", "~"))):
            if given is not None:
                sources[split] = given
            continue
        if not path.is_dir():
            found = f"a file ending in {path.suffix!r}" if path.is_file() else "nothing"
            raise DataError(
                f"{path}: expected a folder with a folder of images per class, or a .parquet file, found {found} there"
            )
        if given is None and not holds_splits(path):
            continue
        folder = split_folder(path, split)
        if folder is None and given is not None:
            raise DataError(f"{path}: expected a folder for {split} in it, as it holds splits; found none")
        if folder is not None:
            sources[split] = folder
    return sources


def _classes(source: str, images: list[LabelledImage], order: tuple[str, ...]) -> tuple[str, ...]:
    """Classes that occur in training: in the data set's own order if it has one, else integers first, then names."""
    found = {image.label for image in images}
    if len(found) < 2:
        raise DataError(f"{source}: expected at least two classes, found {sorted(found)}")
    known = tuple(name for name in order if name in found)
    rest = found.difference(known)
    return (*known, *sorted(rest, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))


def _require_known(images: list[LabelledImage], names: tuple[str, ...], split: str) -> None:
    unseen = sorted({image.label for image in images}.difference(names))
    if unseen:
        first = next(image for image in images if image.label == unseen[0])
        raise DataError(
            f"{split}: expected classes of the training images, found {len(unseen)} others: {', '.join(unseen[:10])} "
            f"(first: {first.where}). The training images have: {', '.join(names[:20])}"
            f"{', …' if len(names) > 20 else ''}"
        )


def _report_copies(digests: Mapping[str, list[bytes]]) -> None:
    copies = repeated(digests["train"])
    if copies:
        log.warning("%d of %d training images are exact copies of others", copies, len(digests["train"]))
    trained_on = set(digests["train"])
    for split, some in digests.items():
        seen = sum(digest in trained_on for digest in some) if split != "train" else 0
        if seen:
            log.warning("%s: %d of %d images are training images too; its score says less", split, seen, len(some))


def _without_copies(
    images: Mapping[str, list[LabelledImage]], digests: Mapping[str, list[bytes]]
) -> tuple[dict[str, list[LabelledImage]], dict[str, list[bytes]]]:
    """Each image once, in the first of test, validation and train that has it."""
    seen: set[bytes] = set()
    kept: dict[str, list[tuple[LabelledImage, bytes]]] = {}
    for split in sorted(images, key=("test", "validation", "train").index):
        kept[split] = []
        for image, digest in zip(images[split], digests[split], strict=True):
            if digest not in seen:
                seen.add(digest)
                kept[split].append((image, digest))
        left_out = len(images[split]) - len(kept[split])
        if left_out:
            log.warning("%s: %d of %d images are copies and are left out", split, left_out, len(images[split]))
        if not kept[split]:
            raise DataError(f"{split}: expected images that are in no other split, found none")
    return (
        {split: [image for image, _ in pairs] for split, pairs in kept.items()},
        {split: [digest for _, digest in pairs] for split, pairs in kept.items()},
    )


def _held_out(
    images: list[LabelledImage], digests: list[bytes], names: tuple[str, ...], share: float, seed: int
) -> tuple[list[tuple[LabelledImage, bytes]], list[tuple[LabelledImage, bytes]]]:
    train, validation = stratified(
        list(zip(images, digests, strict=True)), key=lambda pair: pair[1], label=lambda pair: pair[0].label,
        held_out=share, seed=seed,
    )  # fmt: skip
    missing = sorted(set(names) - {image.label for image, _ in train})
    if missing:
        raise DataError(
            f"held_out: {share:.0%} leaves no training image of {', '.join(missing[:10])}; hold out less, add images "
            "or give a validation set"
        )
    return train, validation


def _require_fit(model: Any, data: Images, name: str) -> None:
    """Makes sure that the model takes what its processor makes, before a run is planned on it."""
    batch = collate([data[0]])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            image_loss(model, batch)
    except (ValueError, RuntimeError, TypeError) as error:
        raise DataError(
            f"{name}: the model does not take what its image processor makes ({_written(batch['pixel_values'].shape)} "
            f"from an RGB image): {error}. Make the size in preprocessor_config.json the model's own"
        ) from error
    finally:
        model.train(was_training)


def _written(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)
