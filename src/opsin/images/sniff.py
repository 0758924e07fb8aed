"""What a file is, by its first bytes and never by its name."""

from __future__ import annotations

import codecs
import contextlib
import re

from opsin.core.errors import BadImage, ImageUnsupported

SUPPORTED = "PNG, JPEG, WebP, AVIF, HEIC, BMP, TIFF and GIF are read"
_PAGES = "turn its pages into images first, for example with: pdftoppm -png FILE page"
_VIDEO = "take still images from it first, for example with: ffmpeg -i FILE frame-%04d.png"
_AUDIO = f"only images can be asked about ({SUPPORTED})"
_UNPACK = "unpack it and give the images inside"
_RENDER = f"save it as PNG first ({SUPPORTED})"
_OTHER = f"give an image ({SUPPORTED})"


_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


def _begins(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


_FORMATS = (
    ("PNG", _begins(rb"\x89PNG\r\n\x1a\n")),
    ("JPEG", _begins(rb"\xff\xd8\xff")),
    ("GIF", _begins(rb"GIF8[79]a")),
    ("TIFF", _begins(rb"(II[*+]\0|MM\0[*+])(?!.{4}CR)")),  # with CR it is Canon's raw file
    ("BMP", _begins(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0")),
    ("WEBP", _begins(rb"RIFF.{4}WEBP")),
    # Brands of the ISO media family: the major one, then a version, then the compatible ones.
    ("AVIF", _begins(rb".{4}ftyp(avi[fs]|m(if|sf)1.{4}(.{4}){0,120}?avi[fs])")),
    ("HEIF", _begins(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif[12]|msf1)")),
)
# What it is, what to do about it, and how it begins; the first that fits wins.
_REFUSED = (
    ("a camera's raw file", _RENDER, _begins(rb"II\*\0|MM\0\*|.{4}ftypcrx |FUJIFILMCCD-RAW")),
    ("an audio file", _AUDIO, _begins(rb".{4}ftyp(M4[ABP]|F4[AB]) |.{8}(WAVE|AIFF)|ID3|fLaC|MThd")),
    ("an MPEG-4 or QuickTime video", _VIDEO, _begins(rb".{4}(ftyp|moov|mdat)")),
    ("a Matroska, WebM or AVI video", _VIDEO, _begins(rb"\x1a\x45\xdf\xa3|.{8}AVI ")),
    ("an MPEG video", _VIDEO, _begins(rb"\0\0\x01[\xba\xb3]|G.{187}G.{187}(G|\Z)")),
    ("an Ogg audio or video file", _AUDIO, _begins(rb"OggS")),
    ("a PDF or PostScript document", _PAGES, _begins(rb".{0,1020}%PDF-|%!PS")),
    ("a Photoshop file", _RENDER, _begins(rb"8BPS")),
    ("an icon or a cursor", _RENDER, _begins(rb"\0\0[\x01\x02]\0|icns")),
    ("a JPEG XL or JPEG 2000 image", _RENDER, _begins(rb"\xff\x0a|\0\0\0\x0c(JXL |jP  )|\xff\x4f\xff\x51")),
    ("an OpenEXR or Radiance HDR image", _RENDER, _begins(rb"\x76\x2f\x31\x01|#\?RADIANCE")),
    ("a DICOM file", _RENDER, _begins(rb".{128}DICM")),
    ("a PNM image", _RENDER, _begins(rb"P[1-7][\s#]+\d")),
    ("a ZIP archive or an Office document", _UNPACK, _begins(rb"PK\x03\x04|\xd0\xcf\x11\xe0")),
    (
        "a tar archive or a packed file",
        _UNPACK,
        _begins(rb".{257}ustar|\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd"),
    ),
    ("a GGUF model file", _OTHER, _begins(rb"GGUF")),
    ("a NumPy file", "load it and hand over the array", _begins(rb"\x93NUMPY")),
    ("a program", _OTHER, _begins(rb"\x7fELF|MZ")),
    ("an MP3 or AAC audio file", _AUDIO, _begins(rb"\xff[\xfb\xf3\xf2\xfa\xf1\xf9]")),
    ("an SVG drawing", _RENDER, _begins(rb"(?i:.*<svg[\s>])")),
    ("a web page", "give the image itself", _begins(rb"(?i:.*<(!doctype\s+html|html|head|body)\b)")),
)


def image_format(data: bytes, name: str) -> str:
    """Name the decoder for `data`, looking at its first 4 KiB.

    Raises ImageUnsupported for a kind that is refused by name, BadImage for text and for bytes of no known kind.
    """
    head = data[:4096]
    for kind, pattern in _FORMATS:
        if pattern.match(head):
            return kind
    for what, remedy, pattern in _REFUSED:
        if pattern.match(head):
            raise ImageUnsupported(f"{name} is {what}, which cannot be read; {remedy}.")
    what = "no image of a known kind, or its beginning is damaged"
    with contextlib.suppress(UnicodeDecodeError):
        # UTF-8 without control characters is text; the last character may be cut in two.
        codecs.getincrementaldecoder("utf-8")().decode(head)
        what = what if _CONTROL.search(head) else "a text file, not an image"
    raise BadImage(f"{name} is {what}; {_OTHER}.")
