"""What an image file says of itself: EXIF, IPTC and XMP, as plain texts for a prompt. No pixel is decoded."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from opsin.core.settings import ImageSettings
from opsin.images.decode import OpenImage

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_SOURCES: dict[str, list[str]] = _TABLE["names"]
NAMES = (*_SOURCES, "camera", "latitude", "longitude")
"""Names that are found in whatever form a file has them; beside them raw ones that begin with exif_, xmp_ and iptc_."""
_IPTC: dict[str, str] = _TABLE["iptc"]
_PREFIXES: dict[str, str] = _TABLE["prefixes"]
_EXIF_IFD, _GPS_IFD, _XMP_TAG = 0x8769, 0x8825, 700
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_MAX_VALUE, _MAX_ALL, _MAX_XMP = 2_000, 64 * 1024, 2**20  # characters, characters, bytes
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_DATE = re.compile(r"(\d{4})[:-]?(\d\d)[:-]?(\d\d)(?:[ T](\d\d:\d\d:\d\d))?(.*)", re.DOTALL)


def read_metadata(data: bytes) -> dict[str, str]:
    """The values by name, at most 2,000 characters each and 64 KiB together. What cannot be read is left out.

    Raises BadImage and its kinds for bytes that are no image.
    """
    image = OpenImage(data, ImageSettings()).header
    raw: dict[str, str] = {}
    for read in (_exif, _iptc, _xmp):
        with suppress(Exception):  # foreign bytes may raise anything, and spoil nothing but themselves
            raw |= dict(read(image))
    raw |= {f"text_{name}".lower(): value for name, value in image.info.items() if isinstance(value, str)}
    found = {name: next((raw[one] for one in sources if raw.get(one)), "") for name, sources in _SOURCES.items()}
    make, model = raw.get("exif_make", ""), raw.get("exif_model", "")
    found["camera"] = model if model.lower().startswith(make.split(" ")[0].lower()) else f"{make} {model}".strip()
    with suppress(Exception):
        found |= _place(image.getexif().get_ifd(_GPS_IFD))
    if match := _DATE.match(found["date"]):
        day, time, rest = (
            "-".join(match.groups()[:3]),
            match[4],
            match[5].strip() or raw.get("exif_offset_time_original", ""),
        )
        found["date"] = f"{day}T{time}{rest}" if time else day
    kept, size = dict[str, str](), 0
    for name, value in (found | raw).items():
        size += len(value)
        if value and size <= _MAX_ALL and not name.startswith("text_"):
            kept[name] = value
    return kept


def _text(value: Any) -> str:
    """A value as one short text."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(_text, value[:64]))
    text = f"{float(value):g}" if type(value).__name__ in {"IFDRational", "float"} else str(value)
    return _CONTROL.sub("", text[:_MAX_VALUE]).strip()


def _exif(image: Any) -> Iterator[tuple[str, str]]:
    from PIL import ExifTags

    exif = image.getexif()
    for tag, value in (*exif.items(), *exif.get_ifd(_EXIF_IFD).items()):
        name = ExifTags.TAGS.get(tag, "")
        if name and tag not in {_EXIF_IFD, _GPS_IFD, _XMP_TAG} and name not in {"MakerNote", "UserComment"}:
            yield f"exif_{_CAMEL.sub('_', name).lower()}", _text(value)


def _iptc(image: Any) -> Iterator[tuple[str, str]]:
    from PIL import IptcImagePlugin

    for (record, number), value in (IptcImagePlugin.getiptcinfo(image) or {}).items():
        if record == 2 and str(number) in _IPTC:
            yield f"iptc_{_IPTC[str(number)]}", _text(value)


def _xmp(image: Any) -> Iterator[tuple[str, str]]:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or getattr(image, "tag_v2", {}).get(_XMP_TAG)
    for name, element in xmp_properties(packet.encode() if isinstance(packet, str) else bytes(packet or b"")):
        if isinstance(element, str):
            yield name, _text(element)
        else:
            items = [item.text or "" for item in element.iter(f"{_RDF}li")] or [element.text or ""]
            yield name, _text(items)


def xmp_properties(packet: bytes) -> Iterator[tuple[str, ET.Element | str]]:
    """The properties of an XMP packet, named `xmp_<prefix>_<name>`; source: ISO 16684-1. Raises ET.ParseError."""
    for description in parse_xmp(packet).iter(f"{_RDF}Description"):
        properties: list[tuple[str, Any]] = [
            *description.attrib.items(),
            *((child.tag, child) for child in description),
        ]
        for key, value in properties:
            space, _, local = key.lstrip("{").rpartition("}")
            prefix = _PREFIXES.get(space) or re.split(r"[/#]", space.strip("/#"))[-1].lower()
            if prefix and prefix != "rdf":
                yield f"xmp_{prefix}_{local}".lower(), value


def parse_xmp(packet: bytes) -> ET.Element:
    """The root of a packet. Raises ET.ParseError; a document type, which could hold entities, is refused, too."""
    packet = packet.rstrip(b"\x00")
    if b"<!DOCTYPE" in packet.upper() or b"\x00" in packet or len(packet) > _MAX_XMP:
        raise ET.ParseError
    return ET.fromstring(packet)  # noqa: S314 - without a document type there are no entities


def _place(gps: Any) -> Iterator[tuple[str, str]]:
    """Decimal degrees; source: Exif 2.32, 4.6.6."""
    for name, reference, tag in (("latitude", 1, 2), ("longitude", 3, 4)):
        if tag in gps:
            degrees, minutes, seconds = (float(part) for part in gps[tag])
            value = degrees + minutes / 60 + seconds / 3600
            yield name, f"{-value if str(gps.get(reference, '')).upper() in {'S', 'W'} else value:.6f}"
