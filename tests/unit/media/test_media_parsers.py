"""What is read from bytes before, or instead of, Pillow: kinds, sizes, counts of frames, directories."""

from __future__ import annotations

import os
import struct
import threading
from typing import Any

import media_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_samples import encode, scene
from PIL import Image

from opsin.core.errors import BadPicture
from opsin.media.header import MOST_FRAMES, gif_frames, png_frames, webp_size
from opsin.media.hush import hushed_libtiff
from opsin.media.ifd import claims_too_much, exif_orientation, tiff_pages
from opsin.media.load import load_picture
from opsin.media.sniff import sniff
from opsin.media.words import show


@pytest.mark.parametrize(("kind", "options"), samples.EVERY, ids=[f"{k}-{o}" for k, o in samples.EVERY])
def test_every_format_is_known_by_its_bytes(kind: str, options: dict[str, Any]) -> None:
    assert sniff(encode(scene(), kind, **options)).format == kind


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
    assert sniff(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(40)).format == expected


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("Grüße\n".encode() * 2000, "a text file"),
        (b"\xef\xbb\xbfwords", "a text file"),
        (("a" + "ä" * 4000).encode(), "a text file"),
        (b"BM is how this text begins, and it is long enough to be taken for a bitmap", "a text file"),
        (b"\x80\x80\x80\x80", ""),
        (b"\x00\x01\x02\x03", ""),
        (b"P6 4 4 255\n" + bytes(48), "a PNM picture"),
        (b"G" * 400, "an MPEG transport stream (video)"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(40), "a camera's raw file"),
    ],
)
def test_kinds_told_apart(data: bytes, name: str) -> None:
    assert sniff(data).name == name


@given(st.binary(max_size=600))
def test_nothing_makes_the_parsers_raise(data: bytes) -> None:
    sniff(data)
    for parse in (png_frames, gif_frames, tiff_pages):
        assert parse(b"GIF89a" + data) >= 1
        assert parse(data) >= 1
    webp_size(b"RIFF\0\0\0\0WEBP" + data)
    for head in (b"", b"Exif\0\0", b"II*\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0"):
        assert 1 <= exif_orientation(head + data) <= 8
        claims_too_much(head + data, whole=True)
        claims_too_much(head + data, whole=False)
        tiff_pages(head + data)


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"save_all": True}])
def test_webp_size_without_the_decoder(options: dict[str, Any]) -> None:
    if "save_all" in options:
        options = {**options, "append_images": [Image.new("RGB", (130, 70))]}
    assert webp_size(encode(scene(130, 70), "WEBP", **options)) == (130, 70)
    rgba = scene(130, 70).convert("RGBA")
    rgba.putalpha(100)
    assert webp_size(encode(rgba, "WEBP")) == (130, 70)


def test_counts_of_frames_are_bounded() -> None:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    assert gif_frames(head + frame * 7 + b";") == 7
    assert gif_frames(head + (b"!\xf9\x04\x00\x00\x00\x00\x00" + frame) * 3) == 3
    assert gif_frames(head + frame * (MOST_FRAMES + 5)) == MOST_FRAMES


def test_a_chain_of_directories_that_bites_itself_ends() -> None:
    assert tiff_pages(samples.tiff([(256, 4, 1, 2)], following=8)) == 1
    second = struct.pack("<HI", 0, 8)
    assert tiff_pages(samples.tiff([(256, 4, 1, 2)], second, following=26)) == 2


@pytest.mark.parametrize(("kind", "code"), [(3, "H"), (4, "I")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_in_both_byte_orders(order: str, kind: int, code: str) -> None:
    mark = b"II*\x00" if order == "<" else b"MM\x00*"
    value = struct.pack(order + code, 6).ljust(4, b"\x00")
    block = mark + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)
    assert exif_orientation(block) == 6
    assert exif_orientation(b"Exif\x00\x00" + block) == 6


def test_tags_that_share_their_bytes_beyond_reason_are_noticed() -> None:
    """The sum counts, over nested directories too; honest tags never add up to more than the file."""
    honest = samples.tiff([(1000, 7, 5000, 26)], bytes(5000))
    assert not claims_too_much(honest, whole=True)
    shared = samples.tiff([(1000 + index, 7, 5000, 8) for index in range(400)], bytes(5000))
    assert claims_too_much(shared, whole=True)
    assert claims_too_much(b"\xff\xd8" + b"Exif\x00\x00" + shared, whole=False)
    assert not claims_too_much(b"\xff\xd8" + b"Exif\x00\x00" + honest, whole=False)
    nested = samples.tiff([(0x8769, 4, 1, 26)], shared[8:])
    assert claims_too_much(nested, whole=True)
    numbers = samples.tiff([(273, 4, 2**20 + 1, 26)], bytes(2**22 + 4))
    assert claims_too_much(numbers, whole=True)


def test_imagemagicks_exif_in_png_text_is_obeyed() -> None:
    block = b"Exif\x00\x00MM\x00*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0) + bytes(4)
    text = b"Raw profile type exif\x00\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    for body in (text, text + b"zz"):
        file = samples.png(1, 2, 8, 0, b"\x00\x00\x00\xff", samples.chunk(b"tEXt", body))
        picture = load_picture(file, samples.LIMITS)
        assert picture.orientation == (1 if body.endswith(b"zz") else 6)


def test_what_libtiff_says_stays_off_stderr_and_other_lines_stay_on_it(capfd: pytest.CaptureFixture[str]) -> None:
    """A damaged LZW strip makes libtiff write to file descriptor 2, past Python."""
    noise = bytearray(encode(scene(), "TIFF", compression="tiff_lzw"))
    noise[8:40] = bytes([0x55]) * 32
    with pytest.raises(BadPicture, match="cut short"):
        load_picture(bytes(noise), samples.LIMITS)
    assert capfd.readouterr().err == ""
    with hushed_libtiff():
        os.write(2, b"LZWDecode: Not enough data at scanline 0.\nINFO: served 200\n")
        writer = threading.Thread(target=os.write, args=(2, b"of another thread\n"))
        writer.start()
        writer.join()
    assert capfd.readouterr().err == "INFO: served 200\nof another thread\n"


def test_names_are_shown_on_one_short_line() -> None:
    assert show("a\nb\x1b\udcff") == "a?b??"
    assert len(show("x" * 10_000)) < 200
