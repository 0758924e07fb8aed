"""Boxes drawn over the image that they are about."""

from collections.abc import Sequence
from pathlib import Path

from opsin.core.answer import Box
from opsin.core.errors import BadParameter
from opsin.core.request import Image

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def check_drawing(path: Path) -> None:
    """Raise BadParameter where no drawing can be written."""
    if path.suffix.lower() not in _ENDINGS:
        raise BadParameter(f"The kind of {path} is not known by its name: use {', '.join(_ENDINGS)}.")
    if not path.parent.is_dir():
        raise BadParameter(f"The folder {path.parent} is not there: make it, or draw to another place.")


def draw_boxes(image: Image, boxes: Sequence[Box], path: Path) -> None:
    """Write the image with its boxes and their labels; `image` has the size of its file. Raises BadParameter."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    drawn = Pil.frombytes("RGB", (image.width, image.height), bytes(image.rgb))
    pen, longest = ImageDraw.Draw(drawn), max(drawn.size)
    line, size = max(2, longest // 300), max(11, longest // 50)
    font = ImageFont.load_default(size)
    for number, box in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        edges = (box.x1, box.y1, box.x2, box.y2)
        if edges[:2] == edges[2:]:
            pen.circle(edges[:2], 2 * line, fill=colour, outline="white")
        else:
            pen.rectangle(edges, outline=colour, width=line)
        corner = (box.x1, box.y1 - 1.3 * size if box.y1 >= 1.3 * size else box.y1)
        pen.text(corner, box.label, colour, font, stroke_width=line, stroke_fill="white")
    try:
        drawn.save(path)
    except OSError as error:
        raise BadParameter(f"{path} cannot be written ({error.strerror or error}): draw to another place.") from None
