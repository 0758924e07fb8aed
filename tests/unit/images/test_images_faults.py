"""Inputs that once took too long, took too much memory, or were answered with invented pixels."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from image_samples import LIMITS, chunk, encode, grey_tiff, png, rgb_of, scene, tiff
from PIL import JpegImagePlugin

import opsin
from opsin.core.errors import BadImage, BadInput, ImageTooLarge
from opsin.core.image_options import ImageOptions, ImageSizes
from opsin.core.request import Image
from opsin.core.settings import ImageSettings
from opsin.images import load_image

FEWER, SIZES = ImageOptions(max_tokens=70), ImageSizes(cell=16, most=500)
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 320, 3), np.uint8))


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def cycle(entries: int) -> bytes:
    """An EXIF block whose directory has `entries` sub-directory pointers to itself."""
    pointers = b"".join(struct.pack("<HHII", (0x8769, 0x8825, 0xA005)[n % 3], 4, 1, 8) for n in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + pointers + bytes(4)


def with_exif(kind: str, block: bytes) -> bytes:
    if kind == "JPEG":
        plain = encode(scene(), "JPEG")
        return plain[:2] + segment(0xE1, b"Exif\0\0" + block) + plain[2:]
    if kind == "PNG":
        return png(1, 2, 8, 0, b"\0\x07\0\x07", chunk(b"eXIf", block))
    head = b"II*\0\x08\0\0\0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow looks into the block it is asked to write
        body = encode(scene(), kind, exif=b"Exif\0\0" + head + bytes(len(block) - 8))
    at = body.index(head)
    return body[:at] + block + body[at + len(block) :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("entries", [50, 200, 5000])
def test_exif_directories_that_point_at_themselves_cost_nothing(kind: str, entries: int) -> None:
    data = with_exif(kind, cycle(entries))
    if kind == "JPEG" and len(data) > 65_000:
        pytest.skip("does not fit a segment")
    load_image(encode(scene(), kind), LIMITS)  # imports the plugin
    begin = time.thread_time()
    assert isinstance(load_image(data, LIMITS), Image)
    assert time.thread_time() - begin < 0.1


def test_a_tiff_whose_directories_point_at_each_other_costs_nothing() -> None:
    tags = [(256, 4, 1, 2), (257, 4, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (279, 4, 1, 4)] + [(tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005)] * 100
    load_image(encode(scene(), "TIFF"), LIMITS)
    begin = time.thread_time()
    load_image(tiff([*tags], following=8), LIMITS)
    assert time.thread_time() - begin < 0.1


def scan_bomb(scans: int, side: int = 10_000) -> bytes:
    """A progressive JPEG of many empty scans, about 110 bytes each; every one of them walks over all blocks."""

    def bits(text: str) -> bytes:
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0")

    blocks = ((side + 7) // 8) ** 2
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    head += segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    head += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    head += segment(0xDA, b"\1\1\0\0\0\0") + bits("0" * blocks)
    empty = segment(0xDA, b"\1\1\0\1\x3f\0") + bits(("0" + "1" * 14) * -(-blocks // 32767))
    return head + empty * scans + b"\xff\xd9"


@pytest.mark.parametrize("scans", [1000, 20_000])
def test_a_jpeg_of_very_many_scans_is_refused_at_once(scans: int) -> None:
    data = scan_bomb(scans)
    begin = time.thread_time()
    with pytest.raises(ImageTooLarge, match="100 scans"):
        load_image(data, LIMITS)
    assert time.thread_time() - begin < 0.2


def test_a_jpeg_of_several_scans_is_read() -> None:
    assert load_image(scan_bomb(20, side=64), LIMITS).width == 64
    assert load_image(encode(NOISE, "JPEG", progressive=True), LIMITS).width == 320


def test_a_jpeg_of_endless_segments_is_refused_at_once() -> None:
    data = encode(scene(), "JPEG")
    begin = time.thread_time()
    with pytest.raises(BadImage, match="segments"):
        load_image(data[:2] + segment(0xE5, b"") * 1_000_000 + data[2:], LIMITS)
    assert time.thread_time() - begin < 0.2


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "optimised": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 3},
    "low quality": {"quality": 5},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_jpeg_cut_short_with_an_end_marker_is_refused(name: str, mode: str, share: float) -> None:
    """libjpeg fills what is missing with grey and reads on as if nothing were wrong."""
    whole = encode(NOISE.convert(mode), "JPEG", **JPEGS[name])
    start = whole.rindex(b"\xff\xda")
    cut = whole[: start + int((len(whole) - start) * share)] + b"\xff\xd9"
    assert isinstance(load_image(whole, LIMITS), Image)
    with pytest.raises(BadImage, match="cut short"):
        load_image(cut, LIMITS)


def test_a_progressive_jpeg_cut_in_its_first_scan_is_refused() -> None:
    whole = encode(NOISE, "JPEG", progressive=True)
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff\xc4", first)
    with pytest.raises(BadImage, match="cut short"):
        load_image(whole[: (first + second) // 2] + b"\xff\xd9", LIMITS)


@pytest.mark.parametrize("size", [400, 1000, 10_000])
def test_a_jpeg_whose_header_claims_more_than_there_is_is_refused(size: int) -> None:
    whole = encode(NOISE, "JPEG", quality=80)
    at = whole.index(b"\xff\xc0")
    data = whole[: at + 5] + struct.pack(">HH", size, size) + whole[at + 9 :]
    begin = time.thread_time()
    with pytest.raises(BadImage, match="cut short"):
        load_image(data, LIMITS)
    assert time.thread_time() - begin < 0.5


@pytest.mark.parametrize("options", [*JPEGS.values(), {"progressive": True}])
@pytest.mark.parametrize("level", [120, 128, 136])
def test_grey_jpegs_that_are_whole_are_read(options: dict[str, Any], level: int) -> None:
    for size in ((8, 8), (200, 133), (1, 1), (900, 700)):
        data = encode(PIL.Image.new("RGB", size, (level,) * 3), "JPEG", **options)
        assert abs(int(rgb_of(load_image(data, LIMITS))[-1, -1, 0]) - level) < 9
    corner = scene()
    corner.paste((128, 128, 128), (20, 10, 48, 32))
    assert load_image(encode(corner, "JPEG", **options), LIMITS).width == 48


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    """Phones put films and gain maps there, with markers of their own."""
    plain = encode(PIL.Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG")
    assert load_image(plain + scan_bomb(150, 64), LIMITS).sha256 == load_image(plain, LIMITS).sha256
    assert load_image(plain + bytes(50_000), LIMITS).sha256 == load_image(plain, LIMITS).sha256


WITHOUT_END = ("the end marker of the JPEG is missing, and nothing else",)


@pytest.mark.parametrize("options", [*JPEGS.values(), {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read(options: dict[str, Any], mode: str) -> None:
    for size in ((320, 224), (317, 201), (9, 9)):
        whole = encode(NOISE.resize(size).convert(mode), "JPEG", **options)
        for part in (whole[:-2], whole[:-1], whole[:-2] + bytes(100)):
            image = load_image(part, LIMITS)
            assert image.sha256 == load_image(whole, LIMITS).sha256
            assert image.notes == WITHOUT_END


@pytest.mark.parametrize("options", [*JPEGS.values(), {"progressive": True}])
def test_a_jpeg_that_lacks_pixels_and_its_end_marker_is_refused(options: dict[str, Any]) -> None:
    whole = encode(NOISE.resize((64, 48)), "JPEG", **options)
    start, identity = whole.rindex(b"\xff\xda") + 14, load_image(whole, LIMITS).sha256
    refused = 0
    for end in range(start, len(whole) - 2):
        try:
            assert load_image(whole[:end], LIMITS).sha256 == identity, end
        except BadImage:
            refused += 1
    assert refused > 0.95 * (len(whole) - 2 - start)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused() -> None:
    whole = encode(NOISE, "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(b"\xff[\xc4\xda]", whole)]
    assert len(scans) > 8
    for at in scans:
        with pytest.raises(BadImage):
            load_image(whole[:at], LIMITS)


def test_a_text_of_50_mb_in_a_png_is_named() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(50 * 2**20), 1)
    with pytest.raises(BadImage, match="text"):
        load_image(png(1, 1, 8, 0, b"\0\x07", chunk(b"zTXt", text)), LIMITS)


@pytest.mark.parametrize(("dtype", "sample_format"), [("<f4", 3), ("<i4", 2)])
def test_wide_samples_have_a_lower_limit_on_pixels(dtype: str, sample_format: int) -> None:
    file = grey_tiff(50, 50, 32, np.zeros((50, 50), dtype).tobytes(), sample_format=sample_format)
    assert load_image(file, ImageSettings(max_pixels=10_000)).width == 50
    with pytest.raises(ImageTooLarge, match="32-bit"):
        load_image(file, ImageSettings(max_pixels=9_999))


CHILD = """
import resource, sys
from opsin.core.errors import BadInput
from opsin.core.settings import ImageSettings
from opsin.images import load_image
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
load_image(sys.argv[2], ImageSettings())
before = peak()
try:
    image = load_image(sys.argv[1], ImageSettings())
    pixels = image.width * image.height
except BadInput:
    pixels = 25_000_000
print((peak() - before) / pixels)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no such file here")
@pytest.mark.parametrize("side", [4999, 9999])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_wide_tiffs_take_bounded_memory(tmp_path: Path, side: int, dtype: Any) -> None:
    """At the limit they take what a colour image of the limit takes: 12 bytes a pixel of 100 million, or less."""
    values = np.zeros((side, side), dtype)
    values[0, 0], values[1, 1] = -1, 70_000
    PIL.Image.fromarray(values).save(tmp_path / "big.tif", compression="tiff_adobe_deflate")
    PIL.Image.fromarray(values[:50, :50].copy()).save(tmp_path / "small.tif", compression="tiff_adobe_deflate")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "big.tif"), str(tmp_path / "small.tif")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(opsin.__file__).parents[1])},
        check=True,
    )
    assert float(child.stdout) < 20


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.images.source._PIPE_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    begin = time.monotonic()
    with pytest.raises(BadImage, match="not a regular file"):
        load_image(pipe, LIMITS)
    assert time.monotonic() - begin < 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_whose_writer_takes_its_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process substitution such as <(curl …) is open from the start and may be slow."""
    monkeypatch.setattr("opsin.images.source._PIPE_SECONDS", 0.0)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = encode(scene(), "PNG")
    descriptor = os.open(pipe, os.O_RDWR)  # there is a writer now, who has written nothing
    reader: list[Image | BadInput] = []
    asked = threading.Event()

    def read() -> None:
        asked.set()
        reader.append(load_image(pipe, LIMITS))

    thread = threading.Thread(target=read)
    thread.start()
    asked.wait(10)
    thread.join(0.3)
    assert thread.is_alive()
    os.write(descriptor, data[:50])
    os.write(descriptor, data[50:])
    os.close(descriptor)
    thread.join(10)
    assert isinstance(reader[0], Image)


def test_an_image_is_returned_as_it_is() -> None:
    image = load_image(encode(scene(), "PNG"), LIMITS)
    assert load_image(image, LIMITS) is image


def test_a_file_is_opened_once_and_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(NOISE, "JPEG")
    opened, hashed = [], []
    header, digest = JpegImagePlugin.JpegImageFile._open, hashlib.sha256  # type: ignore[attr-defined]
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "_open", lambda pil: opened.append(1) or header(pil))
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(1) or digest(data))
    image = load_image(data, LIMITS, FEWER, SIZES)
    assert (image.width, image.height) == (160, 112)
    assert image.notes == ("resized to 160 by 112 pixels for 70 tokens",)
    assert len(opened) == len(hashed) == 1
    assert len(image.rgb) == 160 * 112 * 3


def test_a_smaller_image_is_not_shrunk() -> None:
    image = load_image(encode(scene(), "PNG"), LIMITS, ImageOptions(max_tokens=6), SIZES)
    assert (image.width, image.height, image.notes) == (48, 32, ())


def test_an_image_held_in_memory_counts_too() -> None:
    image = PIL.Image.open(io.BytesIO(encode(NOISE, "JPEG")))
    assert load_image(image, LIMITS, FEWER, SIZES).width == 160
