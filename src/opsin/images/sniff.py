"""What a file is, by its first bytes and never by its name: `kinds.toml` beside this file has the table."""

from __future__ import annotations

import re

from opsin.core.errors import BadImage, ImageUnsupported
from opsin.core.files import read_table

_KINDS = read_table(__file__, "kinds.toml")
ENDINGS: tuple[str, ...] = tuple(_KINDS["endings"])
"""Endings of the names of images that can be read, in lower case."""
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


def image_format(data: bytes, name: str) -> str:
    """Name the decoder for `data`, looking at its first 4 KiB.

    Raises ImageUnsupported for a kind that is refused by name, BadImage for text and for bytes of no known kind.
    """
    head, advice = data[:4096], _KINDS["advice"]
    for kind, pattern in _KINDS["images"].items():
        if re.match(pattern.encode(), head, re.DOTALL):
            return str(kind)
    for refused in _KINDS["refused"]:
        if re.match(refused["begins"].encode(), head, re.DOTALL):
            raise ImageUnsupported(f"{name} is {refused['what']}, which cannot be read; {advice[refused['advice']]}.")
    # UTF-8 without control characters is text; its last character may be cut in two.
    is_text = "\ufffd" not in head.decode(errors="replace")[:-1] and not _CONTROL.search(head)
    what = "a text file, not an image" if is_text else "no image of a known kind, or its beginning is damaged"
    raise BadImage(f"{name} is {what}; {advice['other']}.")
