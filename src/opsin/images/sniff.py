"""What a file is, by its first bytes and never by its name: `kinds.toml` beside this file has the table."""

import re

from opsin.core.errors import BadImage, ImageUnsupported
from opsin.core.files import read_table

_KINDS = read_table(__file__, "kinds.toml")
ENDINGS: tuple[str, ...] = tuple(_KINDS["endings"])
"""Endings of the names of images and documents that can be read, in lower case."""
PDF = "PDF"  # the one kind without pixels: its pages are drawn
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


def image_format(data: bytes, name: str) -> str:
    """Name the decoder for `data`, looking at its first 4 KiB.

    Raises ImageUnsupported for a kind that is refused by name, BadImage for text and for bytes of no known kind.
    """
    head, advice = data[:4096], _KINDS["advice"]
    if kind := _first("images", head):
        return kind
    if refused := _refused(head):
        raise ImageUnsupported(f"{name} is {refused['what']}, which cannot be read here; {advice[refused['advice']]}.")
    # UTF-8 without control characters is text; its last character may be cut in two.
    is_text = "\ufffd" not in head.decode(errors="replace")[:-1] and not _CONTROL.search(head)
    what = "a text file, not an image" if is_text else "no image of a known kind, or its beginning is damaged"
    raise BadImage(f"{name} is {what}; {advice['other']}.")


def video_format(data: bytes, *, animations: bool = False) -> str | None:
    """FFmpeg's name of the format of a video, of an animation where these are wanted, too; None for all else.

    Looks at the first 4 KiB.
    """
    head = data[:4096]
    if animations and (kind := _first("animations", head)):
        return kind
    return None if _first("images", head) else _refused(head).get("demuxer")


def is_pdf(data: bytes) -> bool:
    """Whether a file begins like a PDF."""
    return _first("images", data[:4096]) == PDF


def _first(table: str, head: bytes) -> str:
    kinds: dict[str, str] = _KINDS[table]
    return next((kind for kind, begins in kinds.items() if re.match(begins.encode(), head, re.DOTALL)), "")


def _refused(head: bytes) -> dict[str, str]:
    kinds: list[dict[str, str]] = _KINDS["refused"]
    return next((one for one in kinds if re.match(one["begins"].encode(), head, re.DOTALL)), {})
