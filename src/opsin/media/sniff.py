"""What a file is, told by its first bytes and never by its name."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from opsin.core.errors import BadPicture, PictureUnsupported
from opsin.media.limits import SUPPORTED

_PDF = "turn its pages into pictures first, for example with: pdftoppm -png FILE page"
_VIDEO = "take still pictures from it first, for example with: ffmpeg -i FILE frame-%04d.png"
_AUDIO = f"only pictures can be asked about ({SUPPORTED})"
_UNPACK = "unpack it and give the pictures inside"
_RENDER = f"save it as PNG first ({SUPPORTED})"
_WEB = "give the address or the file of the picture itself"
_OTHER = f"give a picture ({SUPPORTED})"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file: what people call it, and how to mend it when it is no picture we read.

    `format` is the decoder's name when it is one we read, else None.
    """

    name: str
    format: str | None = None
    mend: str = ""


_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)

# (offset, bytes found there, what it is, mend); the first that fits wins
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"%PDF-", "a PDF document", _PDF),
    (0, b"%!PS", "a PostScript document", _PDF),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _VIDEO),
    (0, b"\x00\x00\x01\xba", "an MPEG video", _VIDEO),
    (0, b"\x00\x00\x01\xb3", "an MPEG video", _VIDEO),
    (0, b"FLV\x01", "a Flash video", _VIDEO),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file", _VIDEO),
    (4, b"moov", "a QuickTime video", _VIDEO),
    (4, b"mdat", "a QuickTime video", _VIDEO),
    (0, b"ID3", "an MP3 audio file", _AUDIO),
    (0, b"OggS", "an Ogg audio or video file", _AUDIO),
    (0, b"fLaC", "a FLAC audio file", _AUDIO),
    (0, b"MThd", "a MIDI file", _AUDIO),
    (0, b"#!AMR", "an AMR audio file", _AUDIO),
    (8, b"AIFF", "an AIFF audio file", _AUDIO),
    (0, b"8BPS", "a Photoshop file", _RENDER),
    (0, b"\x00\x00\x01\x00", "a Windows icon", _RENDER),
    (0, b"\x00\x00\x02\x00", "a Windows cursor", _RENDER),
    (0, b"icns", "a macOS icon", _RENDER),
    (0, b"gimp xcf", "a GIMP file", _RENDER),
    (0, b"\xff\x0a", "a JPEG XL picture", _RENDER),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture", _RENDER),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 picture", _RENDER),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture", _RENDER),
    (0, b"qoif", "a QOI picture", _RENDER),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR picture", _RENDER),
    (0, b"#?RADIANCE", "a Radiance HDR picture", _RENDER),
    (0, b"DDS ", "a DDS texture", _RENDER),
    (0, b"AT&TFORM", "a DjVu document", _RENDER),
    (128, b"DICM", "a DICOM file", _RENDER),
    (0, b"FUJIFILMCCD-RAW", "a camera's raw file", _RENDER),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile", _RENDER),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\xd0\xcf\x11\xe0", "an old Office document", _RENDER),
    (0, b"{\\rtf", "an RTF document", _RENDER),
    (0, b"GGUF", "a GGUF model file", _OTHER),
    (0, b"\x93NUMPY", "a NumPy file", "load it and hand over the array"),
    (0, b"SQLite format 3", "an SQLite database", _OTHER),
    (0, b"\x89HDF", "an HDF5 file", _OTHER),
    (0, b"\x7fELF", "a program", _OTHER),
    (0, b"MZ", "a program", _OTHER),
)

_RIFF = {
    b"AVI ": Kind("an AVI video", mend=_VIDEO),
    b"WAVE": Kind("a WAVE audio file", mend=_AUDIO),
    b"ACON": Kind("an animated cursor", mend=_RENDER),
    b"WEBP": Kind("WebP", "WEBP"),
}
_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2")
)
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B ")
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))
_MARKUP = (
    (re.compile(rb"<svg[\s>]", re.IGNORECASE), Kind("an SVG drawing", mend=_RENDER)),
    (re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE), Kind("a web page", mend=_WEB)),
)
# Short marks, so a second one further on must agree where the kind has one.
_LOOSE = (
    (re.compile(rb"G.{187}G.{187}(G|\Z)", re.DOTALL), Kind("an MPEG transport stream (video)", mend=_VIDEO)),
    (re.compile(rb"\xff[\xfb\xf3\xf2\xfa\xf1\xf9]"), Kind("an MP3 or AAC audio file", mend=_AUDIO)),
    (re.compile(rb"P[1-7][\s#]+\d"), Kind("a PNM picture", mend=_RENDER)),
)


def _sniff_ftyp(data: bytes) -> Kind:
    """Tell the members of the ISO media family apart by their brands."""
    end = min(int.from_bytes(data[:4], "big"), 512, len(data))
    major, compatible = data[8:12], {data[at : at + 4] for at in range(16, end - 3, 4)}
    if major in {b"avif", b"avis"} or (major in {b"mif1", b"msf1"} and compatible & {b"avif", b"avis"}):
        return Kind("AVIF", "AVIF")
    if major in _HEIF_BRANDS:
        return Kind("HEIC", "HEIF")
    if major == b"crx ":
        return Kind("a camera's raw file", mend=_RENDER)
    if major in _AUDIO_BRANDS:
        return Kind("an MPEG-4 audio file", mend=_AUDIO)
    return Kind("an MPEG-4 or QuickTime video", mend=_VIDEO)


def _text_kind(head: bytes) -> Kind | None:
    """Tell kinds of text apart by the first few KiB; None when the bytes are no text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Kind("a text file", mend=_OTHER)
    try:
        # not final: a character may be cut in two at the end
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    if any(ord(char) < 32 and char not in "\t\n\r\f\x1b" for char in text):
        return None
    for pattern, kind in _MARKUP:
        if pattern.search(head):
            return kind
    return Kind("a text file", mend=_OTHER)


def _picture_kind(data: bytes) -> Kind | None:
    for magic, name in _PICTURES:
        if data.startswith(magic):
            return (
                Kind("a camera's raw file", mend=_RENDER)
                if name == "TIFF" and data[8:10] == b"CR"
                else Kind(name, name)
            )
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return Kind("BMP", "BMP")
    return None


def _container_kind(data: bytes) -> Kind | None:
    """Tell kinds apart whose first bytes name a family, or are too short a mark to stand alone."""
    if data[4:8] == b"ftyp":
        return _sniff_ftyp(data)
    if data.startswith(b"RIFF"):
        return _RIFF.get(data[8:12], Kind("a RIFF media file", mend=_AUDIO))
    for offset, magic, name, mend in _OTHERS:
        if data.startswith(magic, offset):
            return Kind(name, mend=mend)
    return next((kind for pattern, kind in _LOOSE if pattern.match(data)), None)


def sniff(data: bytes) -> Kind:
    """Tell what `data` is by its first 4 KiB; a kind without a name is unknown."""
    head = data[:4096]
    if kind := _picture_kind(head) or _container_kind(head):
        return kind
    if b"%PDF-" in head[:1024]:
        return Kind("a PDF document", mend=_PDF)
    return _text_kind(head) or Kind("", mend=_OTHER)


def picture_format(data: bytes, name: str) -> str:
    """Name the decoder for `data`.

    Raises PictureUnsupported for a kind that is refused by name, BadPicture for text and for bytes of no known kind.
    """
    kind = sniff(data)
    if kind.format is not None:
        return kind.format
    if not kind.name:
        raise BadPicture(f"{name} is no picture of a known kind, or its beginning is damaged; {kind.mend}.")
    if kind.name == "a text file":
        raise BadPicture(f"{name} is {kind.name}, not a picture; {kind.mend}.")
    raise PictureUnsupported(f"{name} is {kind.name}, which cannot be read; {kind.mend}.")
