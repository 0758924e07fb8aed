"""A JPEG of far more pixels than the model sees is read at a part of its size."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from image_samples import LIMITS, rgb_of
from PIL import Image

from opsin.core.errors import BadImage
from opsin.core.image_options import AS_IT_IS, ImageSizes
from opsin.images import load_image

SEEN = ImageSizes(edge=336)
MOST = 2.0
"""How far, in steps of 255, what the model sees may be from the same of the whole file, on average."""


def photo(width: int, height: int) -> Image.Image:
    """Smooth areas, edges and grain, as a camera has them."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 80, width // 80, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    smooth[height // 4 : height // 2, width // 3 : width // 2] = (20, 30, 40)
    grain = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def file(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "edge", "read"),
    [
        ((2000, 1500), 336, (1000, 750)),
        ((2700, 2000), 224, (675, 500)),
        ((2000, 600), 224, (2000, 600)),
        ((640, 480), 336, (640, 480)),
        ((2000, 1500), 0, (2000, 1500)),
    ],
)
def test_how_much_of_a_file_is_read(size: tuple[int, int], edge: int, read: tuple[int, int]) -> None:
    data = file(photo(*size))
    image, whole = load_image(data, LIMITS, AS_IT_IS, ImageSizes(edge=edge)), load_image(data, LIMITS)
    assert (image.width, image.height) == read
    assert bool(image.notes) == (read != size)
    if edge:
        seen = [Image.fromarray(rgb_of(one)).resize((edge, edge), Image.Resampling.BOX) for one in (image, whole)]
        apart = np.abs(np.asarray(seen[0]).astype(int) - np.asarray(seen[1]).astype(int)).mean()
        assert apart <= MOST


def test_it_is_upright_and_its_note_says_both() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(file(photo(2000, 1500), exif=exif.tobytes()), LIMITS, AS_IT_IS, SEEN)
    assert (image.width, image.height) == (750, 1000)
    assert image.notes[:2] == ("read at 1/2 of its size, as the model sees 336 pixels", image.notes[1])
    assert "upright" in image.notes[1]


def test_a_file_that_is_cut_short_is_still_refused() -> None:
    data = file(Image.new("RGB", (2000, 1500), "white"))
    assert load_image(data, LIMITS, AS_IT_IS, SEEN).width == 1000
    with pytest.raises(BadImage):
        load_image(file(photo(2000, 1500))[:-40_000], LIMITS, AS_IT_IS, SEEN)


def test_other_files_are_read_whole() -> None:
    out = io.BytesIO()
    photo(2000, 1500).save(out, "PNG", compress_level=1)
    assert load_image(out.getvalue(), LIMITS, AS_IT_IS, SEEN).width == 2000


def lossless(width: int, height: int) -> bytes:
    """A lossless JPEG (ITU-T T.81, annex H) of one grey: each pixel is the one bit that says it is as predicted."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    table = segment(0xC4, bytes([0, 1, *[0] * 15, 0]))
    frame = segment(0xC3, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0))
    scan = segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    return b"\xff\xd8" + frame + table + scan + bytes(-(-width * height // 8)) + b"\xff\xd9"


def test_lossless_files_are_read_whole() -> None:
    """libjpeg cannot decode them at a part of their size."""
    image = load_image(lossless(1600, 1600), LIMITS, AS_IT_IS, SEEN)
    assert (image.width, image.notes) == (1600, ())
    assert set(image.rgb) == {128}
