"""Numbers of boxes and points in an answer's text, with their labels, however the model writes them.

JSON (`bbox_2d`, `box_2d`, `point_2d` …), `<box>[[x1, y1, x2, y2]]</box>`, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`,
`<|det|>[[…]]<|/det|>`, `<loc0012>…` and `<loc_12>…`. Brackets alone count, too: llama.cpp leaves control tokens out.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_SPOT = re.compile(
    r"""(?P<locs>(?:<\|?loc_?\d{1,4}\|?>\s*)+)
    | (?:["'](?P<key>bbox|bbox_2d|box|box_2d|point|point_2d)["']\s*:\s*|<\|?(?:box|box_start|det|(?P<tag>point))\|?>)
      (?P<marked>[-+.,\[\]()\s\d]*)
    | (?P<bare>[\[(][-+.,\[\]()\s\d]*)""",
    re.VERBOSE | re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_LABELS = ("label", "name", "class", "category", "text", "text_content", "object", "description")
_NAMED = re.compile(
    rf"""["']({"|".join(_LABELS)})["']\s*:\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""", re.IGNORECASE
)
_REFERENCE = re.compile(r"<\|?(?:ref|object_ref_start)\|?>([^<]*)<", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_AROUND = 2000  # characters around a box in which its label is looked for
_LONGEST_LABEL = 200
_PALIGEMMA, _FLORENCE = 1024, 1000  # places of their `<loc>` tokens


class Spot(NamedTuple):
    """Two numbers of a point, or four of a box, as they are written.

    A `<loc>` says its own `scale` (None: the model's), and `y_first` too.
    """

    label: str
    numbers: tuple[float, ...]
    scale: float | None = None
    y_first: bool | None = None


def find_spots(text: str) -> tuple[list[Spot], int]:
    """All boxes and points of an answer in their order, and how many more there seem to be that cannot be read."""
    found = list(_SPOT.finditer(text))
    if any(one["bare"] is None for one in found):  # then other brackets, as in a transcript, are none
        found = [one for one in found if one["bare"] is None]
    spots: list[Spot] = []
    unread = since = 0
    for one in found:
        written = one["locs"] or one["marked"] or one["bare"] or ""
        numbers = [float(number) for number in _NUMBER.findall(written)]
        if one["bare"] is not None and len(numbers) < 3:
            continue
        is_point = (one["key"] or one["tag"] or "").lower().startswith("point")
        size = 2 if is_point or (len(numbers) == 2 and one["locs"] is None) else 4
        opened, closed = (sum(map(written.count, pair)) for pair in ("[(", "])"))
        if opened > closed or (not opened and one["marked"] and one.end() == len(text)):
            # Broken off: the last number may lack digits.
            numbers, unread = numbers[: (len(numbers) - 1) // size * size], unread + 1
        elif not numbers or len(numbers) % size:
            numbers, unread = [], unread + 1
        kind: tuple[float | None, bool | None] = (None, None)
        if one["locs"] is not None:
            kind = (_FLORENCE, False) if "_" in written else (_PALIGEMMA, True)
        label = _label(text, since, one)
        spots += (Spot(label, tuple(numbers[at : at + size]), *kind) for at in range(0, len(numbers), size))
        since = one.end()
    return spots, unread


def _label(text: str, since: int, spot: re.Match[str]) -> str:
    """What the box is called: in its JSON object, or in front of it, or behind `<loc0012>`."""
    start, end = max(since, spot.start() - _AROUND), spot.end()
    before = text[start : spot.start()]
    if (opened := before.rfind("{")) >= 0:
        named = _NAMED.findall(before[opened:] + text[spot.start() : end + _AROUND].partition("}")[0])
        first = min(named, key=lambda one: _LABELS.index(one[0].lower()), default=("", "", ""))
        return _unescaped(first[1] or first[2])
    if spot["locs"] and "_" not in spot["locs"]:
        return re.split(r"[;<\n]", text[end : end + _LONGEST_LABEL])[0].strip()
    references = _REFERENCE.findall(before)
    label: str = references[-1] if references else _TAG.sub(" ", before.rpartition("\n")[2])
    return label.strip(" \t\r\n,;:*-").lstrip("])} ,")[-_LONGEST_LABEL:].strip()


def _unescaped(label: str) -> str:
    try:
        return str(json.loads(f'"{label}"'))[:_LONGEST_LABEL]
    except ValueError:
        return label[:_LONGEST_LABEL]
