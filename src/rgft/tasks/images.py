"""Labelled images: where they are, whether they can be read, and their pixels when they are asked for.

What is kept of an image is its label and how to get its bytes; pixels are decoded anew each time.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rgft.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

#: Unreadable images that one message names.
MAX_NAMED = 10

#: Images handed to the checking threads at a time.
CHUNK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """One image, on disk or in a table.

    Attributes:
        label: its class.
        where: path, or row of a table, for messages.
        content: reads the encoded bytes.
    """

    label: str
    where: str
    content: Callable[[], bytes]

    def pixels(self) -> Image.Image:
        """The image in RGB, upright as its EXIF data says; of several frames the first.

        Alpha is dropped, palettes are looked up, grey is repeated; 16-bit grey is scaled to 8 bits.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return _decoded(self.content())
        except Exception as error:  # each format's decoder raises kinds of its own
            raise DataError(
                f"{self.where}: expected an image, found none that can be read: {_reason(error)}"
            ) from error


def check(images: Sequence[LabelledImage]) -> list[bytes]:
    """Makes sure that every image can be read, and returns a digest of each one's bytes: equal files, equal digests.

    A PNG is checked by the sums it carries; of other formats all data is decoded (JPEG at an eighth of its size).

    Raises:
        DataError: some cannot be read; the first `MAX_NAMED` are named with the reason.
    """
    digests: list[bytes] = []
    broken: list[str] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            for image, (digest, problem) in zip(chunk, pool.map(_checked, chunk), strict=True):
                digests.append(digest)
                if problem is not None:
                    broken.append(f"{image.where}: {problem}")
    if broken:
        more = f"\n… and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        raise DataError(
            f"{len(broken)} of {len(images)} images cannot be read; replace or remove them:\n"
            + "\n".join(broken[:MAX_NAMED])
            + more
        )
    return digests


def repeated(digests: Sequence[bytes]) -> int:
    """How many images are exact copies of an earlier one."""
    return sum(count - 1 for count in Counter(digests).values())


def _checked(image: LabelledImage) -> tuple[bytes, str | None]:
    from PIL import Image

    try:
        content = image.content()
        with Image.open(io.BytesIO(content)) as opened:
            _require_known_range(opened)
            if opened.format == "PNG":
                opened.verify()
            else:
                opened.draft("RGB", (opened.width // 8, opened.height // 8))
                opened.load()
    except Exception as error:
        return b"", _reason(error)
    return hashlib.sha256(content).digest(), None


def _decoded(content: bytes) -> Image.Image:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        _require_known_range(opened)
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):  # converted as it is, all above 255 would be white
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _require_known_range(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}), of which no white is known; save it as RGB"
        )


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "in no image format that Pillow knows"  # its own words give a memory address
    return " ".join(str(error).split()) or type(error).__name__
