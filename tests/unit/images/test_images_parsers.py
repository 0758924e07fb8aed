"""What is read from bytes before, or instead of, Pillow: kinds, sizes, scans."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import image_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import encode, scene

from opsin.core.errors import BadImage, BadInput, ImageUnsupported
from opsin.images import load_image
from opsin.images.decode import check_jpeg
from opsin.images.sniff import image_format
from opsin.images.source import show


@pytest.mark.parametrize(("kind", "options"), samples.EVERY, ids=[f"{k}-{o}" for k, o in samples.EVERY])
def test_every_format_is_known_by_its_bytes(kind: str, options: dict[str, Any]) -> None:
    assert image_format(encode(scene(), kind, **options), "x") == kind


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        (b"avifXXXXavifmif1", "AVIF"),
        (b"avisXXXXavis", "AVIF"),
        (b"mif1XXXXmif1avifmiaf", "AVIF"),
        (b"mif1XXXXmif1heic", "HEIF"),
        (b"heixXXXXmif1heix", "HEIF"),
        (b"msf1XXXXmsf1hevc", "HEIF"),
        (b"isomXXXXisomavc1", None),
        (b"crx XXXXcrx isom", None),
    ],
)
def test_brands_of_the_iso_media_family(brands: bytes, expected: str | None) -> None:
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(40)
    if expected is not None:
        assert image_format(data, "x") == expected
    else:
        with pytest.raises(ImageUnsupported):
            image_format(data, "x")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("Grüße\n".encode() * 2000, "a text file"),
        (b"\xef\xbb\xbfwords", "a text file"),
        (("a" + "ä" * 4000).encode(), "a text file"),
        (b"BM is how this text begins, and it is long enough to be taken for a bitmap", "a text file"),
        (b"\x80\x80\x80\x80", "no image of a known kind"),
        (b"\x00\x01\x02\x03", "no image of a known kind"),
        (b"P6 4 4 255\n" + bytes(48), "a PNM image"),
        (b"G" * 400, "an MPEG video"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(40), "a camera's raw file"),
    ],
)
def test_kinds_told_apart(data: bytes, name: str) -> None:
    with pytest.raises(BadImage, match=name):
        image_format(data, "x")


@given(st.binary(max_size=600))
def test_nothing_makes_the_parsers_raise_but_bad_input(data: bytes) -> None:
    with contextlib.suppress(BadInput):
        image_format(data, "x")
    with contextlib.suppress(BadInput):
        check_jpeg(b"\xff\xd8\xff" + data, "x", samples.LIMITS)
    for head in (b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPVP8X", b"\xff\xd8\xff\xc0"):
        with pytest.raises(BadInput):
            load_image(head + data, samples.LIMITS)


@pytest.mark.parametrize(("kind", "code"), [(3, "H"), (4, "I")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_byte_orders(order: str, kind: int, code: str) -> None:
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    value = struct.pack(order + code, 6).ljust(4, b"\x00")
    block = mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)
    for exif in (block, b"Exif\x00\x00" + block):
        assert load_image(encode(scene(), "PNG", exif=exif), samples.LIMITS).orientation == 6


def test_imagemagicks_exif_in_png_text_is_obeyed() -> None:
    block = b"Exif\x00\x00MM\x00*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0) + bytes(4)
    text = b"Raw profile type exif\x00\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    for body in (text, text + b"zz"):
        file = samples.png(1, 2, 8, 0, b"\x00\x00\x00\xff", samples.chunk(b"tEXt", body))
        image = load_image(file, samples.LIMITS)
        assert image.orientation == (1 if body.endswith(b"zz") else 6)


@pytest.mark.parametrize("kind", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_whole_and_cut_tiffs_print_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Damaged compressed strips, and cut JPEG tables, make libtiff write a line of its own to file descriptor 2."""
    file = encode(scene(), "TIFF", compression=kind)
    load_image(file, samples.LIMITS)
    for part in (50, 90):
        with pytest.raises(BadInput):
            load_image(file[: len(file) * part // 100], samples.LIMITS)
    assert capfd.readouterr() == ("", "")


def test_names_are_shown_on_one_short_line() -> None:
    assert show("a\nb\x1b\udcff") == "a?b??"
    assert len(show("x" * 10_000)) < 200
