"""Numbers of boxes and points in an answer's text, with their labels, and what they are in pixels of the file.

JSON (`bbox_2d`, `box_2d`, `point_2d` …), `<box>[[x1, y1, x2, y2]]</box>`, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`,
`<|det|>[[…]]<|/det|>`, `<loc0012>…` and `<loc_12>…`. Brackets alone count, too: llama.cpp leaves control tokens out.
From there it goes through mtmd's borders, a region, and a smaller reading.
"""

import json
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import Answer, Box, ImageInfo
from opsin.core.errors import BadParameter
from opsin.core.files import read_table
from opsin.core.model_info import ModelInfo

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
_TABLE = read_table(__file__, "conventions.toml")


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


class Convention(NamedTuple):
    """How a family writes positions; the fields are described in `conventions.toml`."""

    title: str
    scale: float
    frame: str
    y_first: bool = False


_CONVENTIONS = {kind: Convention(**row) for kind, row in _TABLE.items()}


def check_boxes(model: ModelInfo, images: int | None = None) -> Convention:
    """How the model writes boxes. Raises BadParameter where that is not known, or for a number of images that is not 1.

    Models do not say which of several images a box is in.
    """
    found = _CONVENTIONS.get(model.projector or "")
    if found is None:
        known = ", ".join(dict.fromkeys(one.title for one in _CONVENTIONS.values()))
        raise BadParameter(
            f"Boxes cannot be read from the answers of {model.name}: how projectors of the type "
            f"{(model.projector or 'none')[:64]} write positions is not known, or they cannot; leave boxes out, or use "
            f"{known}."
        )
    if images not in {None, 1}:
        raise BadParameter(f"Boxes are read for one image, and there are {images}: ask about each image alone.")
    return found


def with_boxes(answer: Answer, model: ModelInfo) -> Answer:
    """The answer with its boxes; what cannot be read is left out, and a note on the image says so."""
    (image,) = answer.images
    boxes, unread = read_boxes(answer.text, check_boxes(model), image)
    if unread:
        what = "1 box or point was" if unread == 1 else f"{unread} boxes or points were"
        note = f"{what} left out: broken off, not of four numbers, or outside the image"
        image = replace(image, notes=(*image.notes, note))
    return replace(answer, boxes=boxes, images=(image,))


def read_boxes(text: str, convention: Convention, image: ImageInfo) -> tuple[tuple[Box, ...], int]:
    """The boxes and points of a text about an image, and how many cannot be read."""
    spots, unread = find_spots(text)
    boxes = [_box(spot, convention, image) for spot in spots]
    good = tuple(box for box in boxes if box is not None)
    return good, unread + len(boxes) - len(good)


def _box(spot: Spot, convention: Convention, image: ImageInfo) -> Box | None:
    """In pixels of the file, cut off at the image's edges; None for one that is outside, or has no size."""
    if spot.scale is not None:
        convention = convention._replace(scale=spot.scale, y_first=bool(spot.y_first))
    points = np.array(spot.numbers).reshape(-1, 2)
    start, size = frame(convention, image)
    ends = ((points[:, ::-1] if convention.y_first else points) - start) / size
    low, high = ends.min(0), ends.max(0)
    # A point may lie a rounding outside.
    if not np.isfinite(ends).all() or (high < -0.01).any() or (low > 1.01).any():
        return None
    low, high = low.clip(0, 1), high.clip(0, 1)
    if len(points) == 2 and (low == high).any():
        return None
    left, top, width, height = image.region or (0, 0, *image.file_size)
    edges = np.array([left, top]) + np.array([low, high]) * [width, height]
    return Box(spot.label, *edges.ravel().round(1).tolist())


def frame(convention: Convention, image: ImageInfo) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the image begins in the numbers that the model writes, and how large it is there: x and y.

    mtmd keeps its shape and fills up what it makes of it; in single precision (`PAD_CEIL` in `mtmd-image.cpp`).
    """
    if convention.frame == "image":
        return np.zeros(2), np.full(2, convention.scale)
    size = np.array([image.width, image.height], np.float32)
    room = np.maximum(np.array([image.resized_width, image.resized_height], np.float32), 1)
    inner = np.minimum(np.ceil(size * (room / size).min()), room)
    unit = room / convention.scale if convention.scale else np.ones(2)
    return (room - inner) // 2 / unit, inner / unit
