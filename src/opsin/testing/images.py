"""Small images that need no file."""

from __future__ import annotations

import hashlib

from opsin.core.request import Image


def image(seed: int = 0, width: int = 8, height: int = 6) -> Image:
    """An image of one colour, chosen by `seed`; equal arguments give equal images."""
    pixel = hashlib.sha256(str(seed).encode()).digest()[:3]
    rgb = pixel * (width * height)
    digest = hashlib.sha256(width.to_bytes(4, "little") + height.to_bytes(4, "little") + rgb).hexdigest()
    return Image(
        rgb=rgb, width=width, height=height, sha256=digest, format="PNG", source_width=width, source_height=height
    )
