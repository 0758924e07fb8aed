"""Pictures to measure with: drawn from a seed, no two alike, with about the detail of a photograph."""

from __future__ import annotations

import io

import numpy as np

PNG_SIZE = (640, 480)
JPEG_SIZE = (4000, 3000)


def picture_file(seed: int, *, large: bool = False) -> bytes:
    """The bytes of a PNG of 640×480, or of a JPEG of 12 megapixels; equal seeds give equal pictures."""
    from PIL import Image

    width, height = JPEG_SIZE if large else PNG_SIZE
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if not large:
        grain = draw.integers(0, 8, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray((np.asarray(image) & np.uint8(0xF8)) | grain)
    file = io.BytesIO()
    if large:
        image.save(file, "JPEG", quality=90)
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()
