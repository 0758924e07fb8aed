"""Answers in files beside their images: `photo.jpg` gets `photo.txt`, `photo.json` or `photo.xmp`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as ET

from opsin.core.errors import BadInput
from opsin.core.files import write_whole
from opsin.images import ENDINGS
from opsin.images.metadata import parse_xmp

Kind = Literal["txt", "json", "xmp"]
_SPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "x": "adobe:ns:meta/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
}
_RDF, _DC, _XMP = (f"{{{_SPACES[name]}}}" for name in ("rdf", "dc", "xmp"))
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_EMPTY = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x:xmpmeta>'


class SidecarUnreadable(BadInput):
    """There is a sidecar that cannot be read, and it is not overwritten."""


def sidecar_path(image: Path, kind: Kind) -> Path:
    """Where the answer about an image goes: its name with another ending, as Adobe's programs have it.

    `a.png` beside `a.jpg` gets `a.png.txt`: `a.txt` belongs to the image whose ending comes first in the alphabet.
    """
    plain = image.with_suffix(f".{kind}")
    first = next(
        (one for one in sorted(ENDINGS) for name in (one, one.upper()) if image.with_suffix(name).exists()), None
    )
    owner = first is None or image.suffix.lower() == first
    return plain if owner else image.with_name(f"{image.name}.{kind}")


def write_sidecar(path: Path, kind: Kind, row: dict[str, Any]) -> None:
    """Write the text, the whole row as JSON, or an XMP description with keywords, title and rating of the `output`.

    What else an XMP file holds stays. Raises SidecarUnreadable for one that cannot be read, and OSError.
    """
    if kind == "xmp":
        data = _xmp(path, row)
    else:
        text = row["text"] or ""
        data = (json.dumps(row, ensure_ascii=False, indent=2) if kind == "json" else text).encode(
            "utf-8", "replace"
        ) + b"\n"
    write_whole(path, data, 0o644)


def _xmp(path: Path, row: dict[str, Any]) -> bytes:
    try:
        root = parse_xmp(path.read_bytes() if path.exists() else _EMPTY)
        rdf = root if root.tag == f"{_RDF}RDF" else root.find(f"{_RDF}RDF")
    except ET.ParseError:
        rdf = None
    if rdf is None:
        raise SidecarUnreadable(f"{path} is no XMP that can be read, and it is kept: move it away first.")
    for name, space in _SPACES.items():
        ET.register_namespace(name, space)
    description = rdf.find(f"{_RDF}Description")
    if description is None:
        description = ET.SubElement(rdf, f"{_RDF}Description", {f"{_RDF}about": ""})
    output = row.get("output")
    given = output if isinstance(output, dict) else {}
    _put(rdf, description, f"{_DC}description", "Alt", [row["text"] or ""])
    if isinstance(title := given.get("title"), str):
        _put(rdf, description, f"{_DC}title", "Alt", [title])
    words = given.get("keywords", given.get("tags"))
    if isinstance(words, list):
        _put(rdf, description, f"{_DC}subject", "Bag", [str(word) for word in words])
    if isinstance(rating := given.get("rating"), (int, float)):
        _put(rdf, description, f"{_XMP}Rating", "", [str(rating)])
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _put(rdf: ET.Element, description: ET.Element, name: str, kind: str, values: Sequence[str]) -> None:
    """Replace a property, wherever it stood: an array of that kind, or a plain text."""
    for one in rdf.iter(f"{_RDF}Description"):
        one.attrib.pop(name, None)
        for old in one.findall(name):
            one.remove(old)
    made = ET.SubElement(description, name)
    array = ET.SubElement(made, f"{_RDF}{kind}") if kind else made
    for value in values:
        item = ET.SubElement(array, f"{_RDF}li", {_LANGUAGE: "x-default"} if kind == "Alt" else {}) if kind else made
        item.text = "".join(char for char in value if char.isprintable() or char in "\n\t")
