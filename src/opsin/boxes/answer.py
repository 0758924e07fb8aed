"""From the numbers of an answer to pixels of the file: through mtmd's borders, a region, and a smaller reading."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opsin.boxes.text import Spot, find_spots
from opsin.core.answer import Answer, Box, ImageInfo
from opsin.core.errors import BadParameter
from opsin.core.files import read_table
from opsin.core.model_info import ModelInfo

_TABLE = read_table(__file__, "conventions.toml")


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
