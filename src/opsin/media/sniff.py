"""What a file is, by its first bytes and never by its name."""

from __future__ import annotations

import codecs
import re

from opsin.core.errors import BadPicture, PictureUnsupported
from opsin.media.limits import SUPPORTED

_PDF = "turn its pages into pictures first, for example with: pdftoppm -png FILE page"
_VIDEO = "take still pictures from it first, for example with: ffmpeg -i FILE frame-%04d.png"
_AUDIO = f"only pictures can be asked about ({SUPPORTED})"
_UNPACK = "unpack it and give the pictures inside"
_RENDER = f"save it as PNG first ({SUPPORTED})"
_WEB = "give the address or the file of the picture itself"
_OTHER = f"give a picture ({SUPPORTED})"

Kind = tuple[str, str]
"""What people call a kind of file that is not read, and what to do about it."""

_RAW: Kind = ("a camera's raw file", _RENDER)
_TEXT: Kind = ("a text file", _OTHER)

_PICTURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    ((b"GIF87a", b"GIF89a"), "GIF"),
    ((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), "TIFF"),
)
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))

# (offset, bytes found there, what it is, what to do); the first that fits wins.
_OTHERS: tuple[tuple[int, bytes | tuple[bytes, ...], str, str], ...] = (
    (0, b"%PDF-", "a PDF document", _PDF),
    (0, b"%!PS", "a PostScript document", _PDF),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _VIDEO),
    (0, (b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3"), "an MPEG video", _VIDEO),
    (4, (b"moov", b"mdat"), "a QuickTime video", _VIDEO),
    (8, b"AVI ", "an AVI video", _VIDEO),
    (8, (b"WAVE", b"AIFF"), "an audio file", _AUDIO),
    (0, (b"ID3", b"fLaC", b"MThd"), "an audio file", _AUDIO),
    (0, b"OggS", "an Ogg audio or video file", _AUDIO),
    (0, b"8BPS", "a Photoshop file", _RENDER),
    (0, (b"\x00\x00\x01\x00", b"\x00\x00\x02\x00", b"icns"), "an icon or a cursor", _RENDER),
    (0, (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "), "a JPEG XL picture", _RENDER),
    (0, (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51"), "a JPEG 2000 picture", _RENDER),
    (0, (b"\x76\x2f\x31\x01", b"#?RADIANCE"), "an OpenEXR or Radiance HDR picture", _RENDER),
    (128, b"DICM", "a DICOM file", _RENDER),
    (0, b"FUJIFILMCCD-RAW", *_RAW),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document", _UNPACK),
    (0, (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), "an archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", _RENDER),
    (0, b"GGUF", "a GGUF model file", _OTHER),
    (0, b"\x93NUMPY", "a NumPy file", "load it and hand over the array"),
    (0, (b"\x7fELF", b"MZ"), "a program", _OTHER),
)
# Marks so short that a second one further on must agree where the kind has one.
_LOOSE: tuple[tuple[re.Pattern[bytes], Kind], ...] = (
    (re.compile(rb"G.{187}G.{187}(G|\Z)", re.DOTALL), ("an MPEG transport stream (video)", _VIDEO)),
    (re.compile(rb"\xff[\xfb\xf3\xf2\xfa\xf1\xf9]"), ("an MP3 or AAC audio file", _AUDIO)),
    (re.compile(rb"P[1-7][\s#]+\d"), ("a PNM picture", _RENDER)),
)
_MARKUP: tuple[tuple[re.Pattern[bytes], Kind], ...] = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), ("an SVG drawing", _RENDER)),
    (re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE), ("a web page", _WEB)),
)
# Brands of the ISO media family (`ftyp`); whatever else has one is a video.
_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
)
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")


def picture_format(data: bytes, name: str) -> str:
    """Name the decoder for `data`, looking at its first 4 KiB.

    Raises PictureUnsupported for a kind that is refused by name, BadPicture for text and for bytes of no known kind.
    """
    head = data[:4096]
    if found := _find_format(head):
        return found
    kind = _find_other(head)
    if kind is None:
        raise BadPicture(f"{name} is no picture of a known kind, or its beginning is damaged; {_OTHER}.")
    if kind == _TEXT:
        raise BadPicture(f"{name} is a text file, not a picture; {_OTHER}.")
    raise PictureUnsupported(f"{name} is {kind[0]}, which cannot be read; {kind[1]}.")


def _find_format(head: bytes) -> str | None:
    for magic, name in _PICTURES:
        if head.startswith(magic):
            return None if name == "TIFF" and head[8:10] == b"CR" else name
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), 512, len(head))
        major, compatible = head[8:12], {head[at : at + 4] for at in range(16, end - 3, 4)}
        if major in _AVIF_BRANDS or (major in {b"mif1", b"msf1"} and compatible & _AVIF_BRANDS):
            return "AVIF"
        return "HEIF" if major in _HEIF_BRANDS else None
    return None


def _find_other(head: bytes) -> Kind | None:
    if head[4:8] == b"ftyp":
        if head[8:12] == b"crx ":
            return _RAW
        return ("an audio file", _AUDIO) if head[8:12] in _AUDIO_BRANDS else ("an MPEG-4 or QuickTime video", _VIDEO)
    if head.startswith((b"II*\x00", b"MM\x00*")):
        return _RAW
    for offset, magic, name, fix in _OTHERS:
        if head.startswith(magic, offset):
            return name, fix
    if b"%PDF-" in head[:1024]:
        return "a PDF document", _PDF
    return next((kind for pattern, kind in _LOOSE if pattern.match(head)), None) or _find_text(head)


def _find_text(head: bytes) -> Kind | None:
    """Which kind of text it is; None when the bytes are not text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _TEXT
    try:
        # Not final: the last character may be cut in two.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return None
    return next((kind for pattern, kind in _MARKUP if pattern.search(head)), _TEXT)
