"""Limits on size as sentences, and names of sources made fit for one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsin.core.errors import BadImage, ImageTooLarge

if TYPE_CHECKING:
    from opsin.core.settings import ImageSettings

SUPPORTED = "PNG, JPEG, WebP, AVIF, HEIC, BMP, TIFF and GIF are read"
_LONGEST_NAME = 160


def show(name: object) -> str:
    """`name` on one line: unprintable characters become "?", and the middle of a long name is left out."""
    text = "".join(char if char.isprintable() else "?" for char in str(name)[: 10 * _LONGEST_NAME])
    half = _LONGEST_NAME // 2
    return text if len(text) <= _LONGEST_NAME else f"{text[:half]}…{text[-half:]}"


def check_bytes(size: int, name: str, settings: ImageSettings) -> None:
    """Raise ImageTooLarge when `size` bytes are more than the settings allow, BadImage when there are none."""
    if size > settings.max_bytes:
        raise ImageTooLarge(
            f"{name} is larger than the {settings.max_bytes:,} bytes an image file may have; save it smaller first."
        )
    if size == 0:
        raise BadImage(f"{name} is empty (0 bytes); give a file that holds an image.")


def check_size(width: int, height: int, name: str, settings: ImageSettings, *, wide: bool = False) -> None:
    """Raise ImageTooLarge or BadImage unless `width` by `height` pixels are within the settings' limits.

    `wide`: the samples have 32 bits, so a quarter of the pixels is allowed.
    """
    most = settings.max_pixels // 4 if wide else settings.max_pixels
    if width < 1 or height < 1:
        raise BadImage(f"{name} claims a size of {width} by {height} pixels; give an image that has pixels.")
    if width * height > most or max(width, height) > settings.max_edge:
        raise ImageTooLarge(
            f"{name} has {width:,} by {height:,} pixels{' of 32-bit samples' if wide else ''}, and at most {most:,} in "
            f"all and {settings.max_edge:,} along an edge are read; scale it down first."
        )


def damaged(kind: str, name: str) -> BadImage:
    """The error for a file that cannot be decoded whole."""
    label = {"WEBP": "WebP", "HEIF": "HEIC"}.get(kind, kind)
    return BadImage(f"{name} is cut short or damaged ({label}); get a whole copy, or save it again.")
