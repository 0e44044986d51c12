"""What becomes of an image's bytes, and what is said of those that are no image."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgft.errors import DataError
from rgft.tasks.images import LabelledImage, check, repeated
from tests.unit.tasks.pictures import picture


def labelled(content: bytes, where: str = "a.png") -> LabelledImage:
    return LabelledImage(label="a", where=where, content=lambda: content)


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = labelled(content).pixels()
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_as_it_was() -> None:
    image = picture(0, 0)
    for kind in ("PNG", "BMP", "TIFF"):
        assert (pixels(encoded(image, kind)) == np.asarray(image)).all()


def test_grey_palettes_and_alpha_become_rgb() -> None:
    grey = picture(0, 0).convert("L")
    assert (pixels(encoded(grey)) == np.asarray(grey)[..., None]).all()
    palette = picture(0, 0).quantize(7)
    assert (pixels(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()
    alpha = picture(0, 0)
    alpha.putalpha(100)
    assert (pixels(encoded(alpha)) == np.asarray(picture(0, 0))).all()
    assert (pixels(encoded(palette, transparency=b"\0\x80\xff")) == np.asarray(palette.convert("RGB"))).all()


def test_sixteen_bit_grey_is_scaled_not_cut_off() -> None:
    wide = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert (pixels(encoded(Image.fromarray(wide))) == (wide // 257)[..., None]).all()


def test_images_are_upright() -> None:
    image = picture(1, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise is needed
    assert (pixels(encoded(image, exif=exif)) == np.rot90(np.asarray(image), k=-1)).all()


def test_equal_bytes_have_equal_digests() -> None:
    contents = [encoded(picture(0, n)) for n in (0, 1, 0, 0)]
    digests = check([labelled(content) for content in contents])
    assert digests[0] == digests[2] == digests[3] != digests[1]
    assert repeated(digests) == 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("left", [0, 0.5, 0.97])
def test_a_torn_image_is_found(kind: str, left: float) -> None:
    whole = encoded(picture(0, 0, side=64), kind)
    assert len(check([labelled(whole)])) == 1
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read; replace or remove them:\ntorn: "):
        check([labelled(whole), labelled(whole[: int(left * len(whole))], "torn")])


def test_a_changed_byte_in_a_png_is_found() -> None:
    content = bytearray(encoded(picture(0, 0)))
    content[len(content) // 2] ^= 1
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        check([labelled(bytes(content))])


def test_the_first_ten_are_named() -> None:
    images = [labelled(b"text", f"<{n}>") for n in range(13)]
    with pytest.raises(DataError) as caught:
        check(images)
    message = str(caught.value)
    assert "13 of 13" in message
    assert all(f"<{n}>: in no image format that Pillow knows" in message for n in range(10))
    assert "<10>" not in message
    assert message.endswith("… and 3 more")


def test_files_that_cannot_be_opened_and_ranges_that_are_unknown(tmp_path: Path) -> None:
    missing = LabelledImage(label="a", where="m", content=(tmp_path / "m.png").read_bytes)
    floats = labelled(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "f")
    with pytest.raises(DataError, match=r"(?s)m: .*No such file.*f: its pixels are 32-bit numbers \(mode F\)"):
        check([missing, floats])


@pytest.mark.parametrize("broken", [lambda content: content[:-40], lambda content: b""])
def test_an_image_that_breaks_later_is_named(broken: Callable[[bytes], bytes]) -> None:
    with pytest.raises(DataError, match=r"later\.jpg: expected an image, found none that can be read"):
        labelled(broken(encoded(picture(0, 0), "JPEG")), "later.jpg").pixels()
