"""Answers in files beside their images: `photo.jpg` gets `photo.txt`, `photo.json` or `photo.xmp`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from opsin.core.errors import BadInput
from opsin.core.files import write_whole
from opsin.images import ENDINGS
from opsin.images.metadata import xmp_text
from opsin.jobs.output import writing

Kind = Literal["txt", "json", "xmp"]
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_SPACES = {"dc": "http://purl.org/dc/elements/1.1/", "xmp": "http://ns.adobe.com/xap/1.0/"}
_EMPTY = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"/></x:xmpmeta>'.encode()
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# minidom writes these as they are, and a reader makes blanks of them. What stands for them meanwhile is in no XML.
_BLANKS = {9: "\x01", 10: "\x02", 13: "\x03"}
_ESCAPES = {1: "&#9;", 2: "&#10;", 3: "&#13;"}


class SidecarUnreadable(BadInput):
    """There is a sidecar that cannot be read, and it is not overwritten."""


def sidecar_path(image: Path, kind: Kind) -> Path:
    """Where the answer about an image goes: its name with another ending, as Adobe's programs have it (`photo.xmp`).

    Where that could be another image's, it is the whole name with one more: `a.jpg` and `a.png` in one folder get
    `a.jpg.txt` and `a.png.txt`, and so does a name that has no image's ending, or two of them.
    """
    if image.suffix.lower() not in ENDINGS or Path(image.stem).suffix.lower() in ENDINGS:
        return image.with_name(f"{image.name}.{kind}")
    names = [image.with_suffix(ending) for one in ("", *ENDINGS) for ending in {one, one.upper()} - {image.suffix}]
    # On a disk that ignores case, the image has all these names.
    plain = not any(one.is_file() and not (image.exists() and one.samefile(image)) for one in names)
    return image.with_suffix(f".{kind}") if plain else image.with_name(f"{image.name}.{kind}")


def write_sidecar(path: Path, kind: Kind, row: dict[str, Any]) -> None:
    """Write the text, the whole row as JSON, or an XMP description with keywords, title and rating of the `output`.

    What else an XMP file holds stays; keywords are added to those that are there. Others may read the file if they may
    read the one that it replaces, or the folder. Raises SidecarUnreadable for one that cannot be read, OutputFailed.
    """
    text = json.dumps(row, ensure_ascii=False, indent=2) if kind == "json" else row["text"] or ""
    with writing(path):
        data = _xmp(path, row) if kind == "xmp" else f"{text}\n".encode("utf-8", "replace")
        write_whole(path, data, 0o600 | 0o044 & (path if path.exists() else path.parent).stat().st_mode)


def _xmp(path: Path, row: dict[str, Any]) -> bytes:
    """The XMP file at `path`, or a new one, with the answer in it."""
    output = row.get("output")
    given = output if isinstance(output, dict) else {}
    try:
        document: Any = minidom.parseString(xmp_text(path.read_bytes() if path.exists() else _EMPTY))  # noqa: S318
        rdf = document.getElementsByTagNameNS(_RDF, "RDF")[0]
        _put(rdf, "dc:description", "Alt", [row["text"] or ""])
        if isinstance(title := given.get("title"), str):
            _put(rdf, "dc:title", "Alt", [title])
        words = given.get("keywords", given.get("tags"))
        if isinstance(words, list):
            _put(rdf, "dc:subject", "Bag", [word for word in words if isinstance(word, str) and word.strip()])
        if isinstance(rating := given.get("rating"), (int, float)) and not isinstance(rating, bool):
            _put(rdf, "xmp:Rating", "", [f"{rating:g}"])
        for node in document.getElementsByTagName("*"):
            for one in node.attributes.values():
                one.value = one.value.translate(_BLANKS)
        written: str = document.toxml()
    except (ValueError, ExpatError, IndexError, RecursionError):
        raise SidecarUnreadable(f"{path} is no XMP that can be read, and it is kept: move it away first.") from None
    return written.translate(_ESCAPES).encode()


def _put(rdf: Any, name: str, kind: str, values: Sequence[str]) -> None:
    """Set a property, wherever it stood: an array of that kind, or a plain text.

    Of an alternative only what is for no language changes; a bag keeps what it has.
    """
    document, (prefix, _, local) = rdf.ownerDocument, name.partition(":")
    space, of_rdf = _SPACES[prefix], f"{rdf.prefix}:" if rdf.prefix else ""
    groups = [node for node in rdf.childNodes if node.localName == "Description" and node.namespaceURI == _RDF]
    if not groups:
        groups = [rdf.appendChild(document.createElementNS(_RDF, f"{of_rdf}Description"))]
        groups[0].setAttributeNS(_RDF, f"{of_rdf}about", "")
    made = document.createElementNS(space, name)
    made.setAttribute(f"xmlns:{prefix}", space)  # whatever the prefix means around it
    array = made.appendChild(document.createElementNS(_RDF, f"{of_rdf}{kind}")) if kind else made
    kept = [item for group in groups for item in _take_out(group, space, local)]
    groups[0].appendChild(made)
    if kind == "Bag":
        there = {"".join(getattr(node, "data", "") for node in array.appendChild(one).childNodes) for one in kept}
        values = [value for value in dict.fromkeys(values) if value not in there]
    for value in values:
        item = array.appendChild(document.createElementNS(_RDF, f"{of_rdf}li")) if kind else made
        if kind == "Alt":
            item.setAttribute("xml:lang", "x-default")
        item.appendChild(document.createTextNode(_NOT_XML.sub("", value)))
    for one in kept if kind == "Alt" else ():
        if one.getAttribute("xml:lang") not in {"x-default", ""}:
            array.appendChild(one)


def _take_out(group: Any, space: str, local: str) -> list[Any]:
    """Remove a property from a description; what its array held."""
    if group.hasAttributeNS(space, local):
        group.removeAttributeNS(space, local)
    found = [node for node in group.childNodes if (node.namespaceURI, node.localName) == (space, local)]
    return [item for node in found for item in group.removeChild(node).getElementsByTagNameNS(_RDF, "li")]
