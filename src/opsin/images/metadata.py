"""What an image file says of itself: EXIF, IPTC and XMP, as plain texts for a prompt. No pixel is decoded."""

import math
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime
from typing import Any
from xml.etree import ElementTree as ET

from opsin.core.files import read_table
from opsin.core.settings import ImageSettings
from opsin.images.decode import OpenImage

_TABLE = read_table(__file__, "metadata.toml")
_SOURCES: dict[str, list[str]] = _TABLE["names"]
NAMES = (*_SOURCES, "camera", "latitude", "longitude")
"""Names that are found in whatever form a file has them; beside them raw ones that begin with exif_, xmp_ and iptc_."""
_IPTC: dict[str, str] = _TABLE["iptc"]
_PREFIXES: dict[str, str] = _TABLE["prefixes"]
_EXIF_IFD, _GPS_IFD, _INTEROP_IFD, _XMP_TAG = 0x8769, 0x8825, 0xA005, 700
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_MAX_VALUE, _MAX_ALL, _MAX_XMP = 2_000, 64 * 1024, 2**20  # characters, characters, bytes
# Control characters, marks that change the order of a line, halves of pairs, noncharacters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_DECLARATION = re.compile(r"<!(?!--|\[CDATA\[)")
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"IEND"}


def read_metadata(data: bytes, limits: ImageSettings | None = None) -> dict[str, str]:
    """The values by name, at most 2,000 characters each and 64 KiB together. What cannot be read is left out.

    Dates are ISO 8601, latitude and longitude decimal degrees. Raises BadImage and its kinds for bytes that are no
    image within `limits`.
    """
    image = OpenImage(_without_pixels(data), limits or ImageSettings()).image
    raw: dict[str, str] = {}
    for read in (_exif, _iptc, _xmp):
        with suppress(Exception):  # foreign bytes may raise anything, and spoil nothing but themselves
            raw |= dict(read(image))
    raw |= {f"text_{name}".lower(): value for name, value in image.info.items() if isinstance(value, str)}
    _join_times(raw)
    found = {name: next((raw[one] for one in sources if raw.get(one)), "") for name, sources in _SOURCES.items()}
    found |= {name: "" for name in ("iso", "aperture", "exposure", "focal_length") if found[name] == "0"}  # unknown
    found["date"] = next(filter(None, (_iso(raw.get(one, "")) for one in _SOURCES["date"])), "")
    make, model = raw.get("exif_make", ""), raw.get("exif_model", "")
    found["camera"] = model if model.lower().startswith(make.split(" ")[0].lower()) else f"{make} {model}".strip()
    with suppress(Exception):
        found |= _place(image.getexif().get_ifd(_GPS_IFD))
    kept, size = dict[str, str](), 0
    for name, value in (found | raw).items():
        size += len(value)
        if value and size <= _MAX_ALL and not name.startswith("text_"):
            kept[name] = value
    return kept


def _without_pixels(data: bytes) -> bytes:
    """A PNG's header and metadata, as Pillow decodes the pixels to find what comes after them; others as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    parts, at = [data[:8]], 8
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind in _PNG_CHUNKS:
            parts.append(data[at : at + size + 12])
        at += size + 12
    return b"".join(parts)


def _text(value: Any) -> str:
    """A value as one short text; "" for a number that is none."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(_text, value[:64]))
    if type(value).__name__ in {"IFDRational", "float"}:
        return f"{float(value):g}" if math.isfinite(value) else ""
    text = str(value)
    with suppress(UnicodeError):  # Pillow reads all EXIF as Latin-1, and much of it is UTF-8
        text = text.encode("latin-1").decode()
    return _CONTROL.sub("", text[:_MAX_VALUE]).strip()


def _exif(image: Any) -> Iterator[tuple[str, str]]:
    from PIL import ExifTags

    exif = image.getexif()
    for pointer, names in ((0, ExifTags.TAGS), (_EXIF_IFD, ExifTags.TAGS), (_GPS_IFD, ExifTags.GPSTAGS)):
        with suppress(Exception):  # the other directories may be whole
            tags: Any = exif.get_ifd(pointer) if pointer else exif
            for tag in tags:
                name = names.get(tag, "")
                if name and tag not in {_EXIF_IFD, _GPS_IFD, _INTEROP_IFD, _XMP_TAG} and name != "MakerNote":
                    with suppress(Exception):
                        yield f"exif_{_CAMEL.sub('_', name).lower()}", _text(_exif_value(name, tags[tag], exif.endian))


def _exif_value(name: str, value: Any, endian: str) -> Any:
    """Texts in UTF-16, which only their names tell; source: Exif 2.32, 4.6.5, and Windows' own tags."""
    if isinstance(value, bytes) and name.startswith("XP"):
        return value.decode("utf-16-le", "ignore").replace(";", ", ")
    if isinstance(value, bytes) and name == "UserComment":
        wide = "utf-16-be" if endian == ">" else "utf-16-le"
        return value[8:].decode(wide, "ignore") if value[:7] == b"UNICODE" else value[8:]
    return value


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
            items = list(element.iter(f"{_RDF}li")) or [element]
            usual = [item for item in items if item.get(_LANGUAGE) == "x-default"]
            yield name, _text([item.text or "" for item in usual[:1] or items])


def xmp_properties(packet: bytes) -> Iterator[tuple[str, ET.Element | str]]:
    """The properties of an XMP packet, named `xmp_<prefix>_<name>`; source: ISO 16684-1.

    Raises ET.ParseError and ValueError.
    """
    root = ET.fromstring(xmp_text(packet))  # noqa: S314 - without a document type there are no entities
    for description in root.iter(f"{_RDF}Description"):
        children = ((child.tag, child) for child in description)
        properties: list[tuple[str, Any]] = [*description.attrib.items(), *children]
        for key, value in properties:
            space, _, local = key.lstrip("{").rpartition("}")
            prefix = _PREFIXES.get(space) or re.split(r"[/#]", space.strip("/#"))[-1].lower()
            if prefix and prefix != "rdf":
                yield f"xmp_{prefix}_{local}".lower(), value


def xmp_text(packet: bytes) -> str:
    """A packet as text, whatever encoding it claims. Raises ValueError where it is too large, or may hold entities."""
    wide = packet.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = packet.decode("utf-16" if wide else "utf-8-sig").strip("\0 \t\r\n")
    if len(packet) > _MAX_XMP or _DECLARATION.search(text):  # entities are defined in a document type
        raise ValueError
    return text


def _place(gps: Any) -> Iterator[tuple[str, str]]:
    """Decimal degrees; source: Exif 2.32, 4.6.6."""
    for name, reference, tag, most in (("latitude", 1, 2, 90), ("longitude", 3, 4, 180)):
        if tag in gps:
            value = sum(float(part) / 60**power for power, part in enumerate(gps[tag]))
            if 0 <= value <= most:  # which what is no number is not
                yield name, f"{-value if str(gps.get(reference, '')).upper() in {'S', 'W'} else value:.6f}"


def _join_times(raw: dict[str, str]) -> None:
    """Give dates the offsets and times that EXIF and IPTC keep apart from them."""
    for when in ("original", "digitized"):
        if date_time := raw.get(f"exif_date_time_{when}"):
            raw[f"text_date_{when}"] = date_time + raw.get(f"exif_offset_time_{when}", "")
    raw["text_iptc_date"] = f"{raw.get('iptc_date', '')}T{raw.get('iptc_time', '')}"


def _iso(text: str) -> str:
    """A date in ISO 8601, with the time and offset that it has; "" for what is none. A year or a month will do."""
    text = re.sub(r"^(\d{4}):(\d\d):(\d\d)", r"\1-\2-\3", text)
    if re.fullmatch(r"[1-9]\d{3}(-(0[1-9]|1[0-2]))?", text):
        return text
    with suppress(ValueError):
        return date.fromisoformat(text).isoformat()
    with suppress(ValueError):
        return datetime.fromisoformat(text).isoformat(timespec="seconds")  # the one a camera's clock had
    return ""
