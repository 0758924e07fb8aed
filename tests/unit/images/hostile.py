"""Broken and hostile files, made anew: `hostile_files()` for tests, or `python hostile.py DIR` to write them out."""

from __future__ import annotations

import io
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from image_samples import LOSSLESS, LOSSY, chunk, encode, grey_tiff, png, scene, tiff
from PIL import Image

_EXTENSIONS = {"JPEG": "jpg", "HEIF": "heic", "TIFF": "tif"}


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 255, (40, 56, 3), np.uint8))


def _truncated() -> Iterator[tuple[str, bytes]]:
    for kind, options in {**LOSSY, **LOSSLESS}.items():
        data = encode(_noise(), kind, **options)
        ending = _EXTENSIONS.get(kind, kind.lower())
        for percent in (5, 50, 90):
            yield f"truncated-{percent}.{ending}", data[: max(12, len(data) * percent // 100)]


def _huge_headers() -> Iterator[tuple[str, bytes]]:
    """Headers that claim far more pixels than anyone allows, with next to nothing behind them."""
    yield "huge.png", png(2**31 - 1, 2**31 - 1, 8, 6, b"\x00" * 64)
    yield "bomb-100000.png", png(100_000, 100_000, 1, 0, b"\x00" * 2**22)
    yield "huge.tif", grey_tiff(2**31 - 1, 2**31 - 1, 8, b"\x00" * 64)
    yield "huge.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + _gif_frame(1, 1) + b";"
    yield "huge-frame.gif", b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + _gif_frame(65535, 65535)
    for name, size in (("huge", 16384), ("canvas", 2**24)):
        canvas = (size - 1).to_bytes(3, "little") * 2
        yield f"{name}.webp", _riff(_riff_chunk(b"VP8X", b"\x02\x00\x00\x00" + canvas) + _riff_chunk(b"ANIM", bytes(6)))
    yield "huge-lossy.webp", _riff(_riff_chunk(b"VP8 ", b"\x10\x00\x00\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20)))
    yield "huge-lossless.webp", _riff(_riff_chunk(b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(20)))
    jpeg = bytearray(encode(scene(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
    yield "huge.jpg", bytes(jpeg)
    jpeg[at + 1] = 0xC2
    yield "huge-progressive.jpg", bytes(jpeg)
    for name, width, height in (("huge", 2**31 - 1, 2**31 - 1), ("upside-down", 60_000, -60_000), ("no", 0, 0)):
        yield f"{name}.bmp", _bmp(width, height, b"\x00" * 64)
    avif = bytearray(encode(scene(), "AVIF"))
    at = avif.index(b"ispe")
    avif[at + 8 : at + 16] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    yield "huge.avif", bytes(avif)
    heic = bytearray(encode(scene(), "HEIF"))
    at = heic.index(b"ispe")
    heic[at + 8 : at + 16] = struct.pack(">II", 60_000, 60_000)
    yield "huge.heic", bytes(heic)


def _gif_frame(width: int, height: int) -> bytes:
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"


def _riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\x00" * (len(body) % 2)


def _riff(body: bytes, form: bytes = b"WEBP") -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + form + body


def _bmp(width: int, height: int, body: bytes, bits: int = 24, compression: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + head + body


def _png_tricks() -> Iterator[tuple[str, bytes]]:
    grey = b"\x00\x07" * 4
    deflated = zlib.compress(b"A" * 2**27, 1)
    yield "zero-size.png", png(0, 0, 8, 0, b"")
    yield "text-bomb.png", png(1, 4, 8, 0, grey, *[chunk(b"zTXt", b"Comment\x00\x00" + deflated)] * 4)
    yield "itxt-bomb.png", png(1, 4, 8, 0, grey, chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + deflated))
    yield "icc-bomb.png", png(1, 4, 8, 0, grey, chunk(b"iCCP", b"icc\x00\x00" + deflated))
    yield "many-texts.png", png(1, 4, 8, 0, grey, *[chunk(b"tEXt", b"k%d\x00" % i + b"v" * 1000) for i in range(4000)])
    yield "exif-bomb.png", png(1, 4, 8, 0, grey, chunk(b"eXIf", _tag_bomb()))
    yield "data-bomb.png", png(1, 4, 8, 0, b"\x00" * 2**27)
    yield "no-data.png", png(64, 64, 8, 2, None)
    yield "unknown-colour.png", png(4, 4, 8, 5, b"\x00" * 64)
    yield "unknown-depth.png", png(4, 4, 3, 0, b"\x00" * 64)
    whole = png(1, 4, 8, 0, grey)
    yield "wrong-checksum.png", whole[:29] + bytes([whole[29] ^ 1]) + whole[30:]
    at = whole.index(b"IDAT")
    yield "damaged-data.png", whole[: at + 8] + b"\xff\xff" + whole[at + 10 :]
    yield "endless-chunk.png", whole[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + b"\x78\x9c"
    frames = struct.pack(">II", 2**31 - 1, 0)
    yield "endless-animation.png", png(1, 4, 8, 0, grey, chunk(b"acTL", frames))
    yield "apple-optimised.png", whole[:8] + chunk(b"CgBI", b"\x50\x00\x20\x06") + whole[8:]
    yield "1x20000.png", png(1, 20_000, 8, 0, b"\x00\x80" * 20_000)
    yield "20000x1.png", png(20_000, 1, 8, 0, b"\x00" + b"\x80" * 20_000)


def _tag_bomb(entries: int = 5000, claim: int = 300_000) -> bytes:
    """A directory whose every entry claims the same bytes: read one by one they are 1.5 GB."""
    tags = [(1000 + index, 7, claim, 8) for index in range(entries)]
    return tiff(list(tags), b"\x00" * claim)


def _tiff_tricks() -> Iterator[tuple[str, bytes]]:
    yield "tag-bomb.tif", _tag_bomb()
    one = grey_tiff(2, 2, 8, b"\x01\x02\x03\x04")
    looped = bytearray(one)
    looped[8 + 2 + 120 : 8 + 2 + 124] = struct.pack("<I", 8)
    yield "looping-directories.tif", bytes(looped)
    sub = [(256, 4, 1, 2), (257, 4, 1, 2), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)]
    yield "nested-directories.tif", tiff(list(sub))
    tiles = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tiles += [(322, 4, 1, 2**20), (323, 4, 1, 2**20), (324, 4, 1, 200), (325, 4, 1, 8)]
    yield "huge-tile.tif", tiff(list(tiles), zlib.compress(bytes(2**20)))
    yield (
        "endless-strips.tif",
        tiff([(256, 4, 1, 9), (257, 4, 1, 9), (273, 4, 2**30, 8), (279, 4, 2**30, 8)], bytes(64)),
    )
    yield "no-directory.tif", b"II*\x00\xff\xff\xff\x7f"
    yield "no-tags.tif", tiff([])
    yield "wide-samples.tif", grey_tiff(4, 4, 64, bytes(128))
    yield "many-samples.tif", one.replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 65535))
    yield "big-directory.tif", b"II+\x00\x08\x00\x00\x00" + struct.pack("<Q", 16) + struct.pack("<Q", 2**63)
    yield "zero-size.tif", grey_tiff(0, 0, 8, b"")


def _jpeg_tricks() -> Iterator[tuple[str, bytes]]:
    whole = encode(scene(), "JPEG")
    at = whole.index(b"\xff\xc0")
    yield "no-components.jpg", whole[: at + 9] + b"\x00" + whole[at + 10 :]
    yield "twelve-bit.jpg", whole[: at + 4] + b"\x0c" + whole[at + 5 :]
    yield "no-size.jpg", whole[: at + 5] + bytes(4) + whole[at + 9 :]
    yield "only-a-mark.jpg", b"\xff\xd8\xff"
    yield "endless-fill.jpg", b"\xff\xd8" + b"\xff" * 2**16
    yield "no-tables.jpg", whole[:2] + whole[at:]
    exif = b"Exif\x00\x00" + _tag_bomb(2000, 40_000)
    yield "exif-bomb.jpg", whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + whole[2:]
    parts = [exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\x00\x00" + part.removeprefix(b"Exif\x00\x00")
        for part in parts
    )
    yield "long-exif.jpg", whole[:2] + segments + whole[2:]


def _other_tricks() -> Iterator[tuple[str, bytes]]:
    frame = _gif_frame(1, 1)
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    yield "65535-frames.gif", gif + frame * 65_535 + b";"
    yield "endless-comment.gif", gif + b"!\xfe" + (b"\xff" + b"x" * 255) * 2000
    yield "no-frames.gif", gif + b";"
    yield "zero-size.gif", b"GIF89a" + bytes(7)
    yield "slow-run-length.bmp", _bmp(30_000, 3_300, b"\x01\x01\x00\x00" * 3_300, bits=8, compression=1)
    yield "unknown-compression.bmp", _bmp(4, 4, bytes(64), compression=77)
    others = [Image.new("RGB", (56, 40), (n, n, n)) for n in range(4)]
    yield "animated.webp", encode(_noise(), "WEBP", save_all=True, append_images=others)
    yield "animated.png", encode(_noise(), "PNG", save_all=True, append_images=others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow looks into the block it is asked to write
        yield "exif-bomb.avif", encode(scene(), "AVIF", exif=b"Exif\x00\x00" + _tag_bomb())
    yield "empty-boxes.heic", _box(b"ftyp", b"heic\x00\x00\x00\x00heicmif1") + _box(b"meta", b"")
    yield "endless-box.avif", _box(b"ftyp", b"avif\x00\x00\x00\x00avifmif1") + b"\xff\xff\xff\xffmeta"


def _no_images() -> Iterator[tuple[str, bytes]]:
    yield "empty.png", b""
    yield "one-byte.jpg", b"\xff"
    yield "text.jpg", "Dear image, how are you? ä\n".encode() * 200
    yield "text16.png", "words".encode("utf-16")
    yield "page.html.png", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "drawing.svg", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>'
    yield "paper.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"
    yield "late.pdf", b"\x00junk\xff" * 20 + b"%PDF-1.4\n"
    yield "film.mp4", _box(b"ftyp", b"isom\x00\x00\x02\x00isomiso2avc1mp41") + _box(b"mdat", bytes(64))
    yield "film.mov", _box(b"ftyp", b"qt  \x00\x00\x02\x00qt  ")
    yield "song.m4a", _box(b"ftyp", b"M4A \x00\x00\x02\x00M4A isom")
    yield "film.mkv", b"\x1a\x45\xdf\xa3" + bytes(64)
    yield "film.avi", _riff(_riff_chunk(b"LIST", bytes(32)), b"AVI ")
    yield "film.mpg", b"\x00\x00\x01\xba" + bytes(64)
    yield "film.ts", (b"\x47" + bytes(187)) * 4
    yield "sound.wav", _riff(_riff_chunk(b"fmt ", bytes(16)), b"WAVE")
    yield "sound.mp3", b"ID3\x04\x00" + bytes(64)
    yield "bare.mp3", b"\xff\xfb\x90\x64" + bytes(400)
    yield "sound.flac", b"fLaC" + bytes(64)
    yield "sound.ogg", b"OggS" + bytes(64)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as pack:
        pack.writestr("a.png", encode(scene(), "PNG"))
    yield "images.zip", archive.getvalue()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    yield "images.tar", archive.getvalue()
    yield "icon.ico", b"\x00\x00\x01\x00\x01\x00" + bytes(40)
    yield "layers.psd", b"8BPS\x00\x01" + bytes(40)
    yield "new.jxl", b"\xff\x0a" + bytes(40)
    yield "model.gguf.png", b"GGUF\x03\x00\x00\x00" + bytes(40)
    yield "zeros.jpg", bytes(4096)
    yield "random.png", np.random.default_rng(3).bytes(4096)
    yield "image-named.txt", encode(scene(), "PNG")
    yield "jpeg-named.png", encode(scene(), "JPEG")


def hostile_files() -> list[tuple[str, bytes]]:
    """(file name, contents): each must give one plain sentence or an image, fast and in little memory."""
    makers = (_truncated, _huge_headers, _png_tricks, _tiff_tricks, _jpeg_tricks, _other_tricks, _no_images)
    return [file for make in makers for file in make()]


if __name__ == "__main__":
    for file_name, contents in hostile_files():
        Path(sys.argv[1], file_name).write_bytes(contents)
