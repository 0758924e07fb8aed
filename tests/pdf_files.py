"""PDFs made by hand: pages of drawing operators, or of one image each."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

RED_SQUARE = b"1 0 0 rg 50 50 100 100 re f"
TEXT = b"BT /F 24 Tf 20 150 Td (Invoice 4711) Tj ET"


def file_of(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of these objects, the first of which is its catalogue."""
    out, places = b"%PDF-1.7\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1)
    root = b"trailer<</Size %d/Root 1 0 R%s>>\n" % (len(places) + 1, trailer)
    return out + head + table + root + b"startxref\n%d\n%%%%EOF\n" % len(out)


def stream(data: bytes, about: bytes = b"") -> bytes:
    return b"<</Length %d%s>>stream\n%s\nendstream" % (len(data), about, data)


def pdf(*pages: bytes, box: bytes = b"0 0 200 200", things: Sequence[bytes] = (), resources: bytes = b"") -> bytes:
    """One page for each content; `things` are further objects, from number 4 on."""
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    first = 4 + len(things)
    kids = b" ".join(b"%d 0 R" % (first + 2 * at) for at in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(pages)),
        font,
        *things,
    ]
    for at, content in enumerate(pages):
        fonts = b"/Resources<</Font<</F 3 0 R>>%s>>" % resources
        objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents %d 0 R%s>>" % (box, first + 2 * at + 1, fonts))
        objects.append(stream(content))
    return file_of(objects)


def images_pdf(*images: Image.Image) -> bytes:
    """A page of 448 by 448 points for each image, which fills it."""
    things, names = [], b""
    for at, image in enumerate(images):
        about = b"/Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceRGB" % image.size
        pixels = zlib.compress(image.convert("RGB").tobytes())
        things.append(stream(pixels, about + b"/BitsPerComponent 8/Filter/FlateDecode"))
        names += b"/I%d %d 0 R" % (at, 4 + at)
    pages = [b"q 448 0 0 448 0 0 cm /I%d Do Q" % at for at in range(len(images))]
    return pdf(*pages, box=b"0 0 448 448", things=things, resources=b"/XObject<<%s>>" % names)


def write_images_pdf(path: Path, *images: Image.Image) -> Path:
    path.write_bytes(images_pdf(*images))
    return path


def hostile() -> dict[str, bytes]:
    """PDFs that cannot be read, by the word that says why."""
    deep = 3_000
    tree = [b"<</Type/Pages/Kids[%d 0 R]/Count 1/Parent %d 0 R>>" % (at + 3, at + 1) for at in range(deep)]
    nested = [b"<</Type/Catalog/Pages 2 0 R>>", *tree, b"<</Type/Page/Parent %d 0 R>>" % (deep + 1)]
    locked = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>/ID[<00><00>]" % (b"00" * 32, b"11" * 32)
    return {
        "password": file_of([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"], locked),
        "without pages": file_of([b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[]/Count 0>>"]),
        "damaged PDF": pdf(RED_SQUARE)[:150],
        "page 1 of": file_of(nested),
    }


def endless() -> bytes:
    """One page whose drawing takes four to the power of thirty steps."""
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]"
    things = [stream(b"/A Do " * 4, form + b"/Resources<</XObject<</A %d 0 R>>>>" % (5 + at)) for at in range(30)]
    return pdf(b"/A Do", things=[*things, stream(RED_SQUARE, form)], resources=b"/XObject<</A 4 0 R>>")
