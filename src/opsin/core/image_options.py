"""How an image is shown to the model: which part of it, in how many tokens; and what the model makes of its size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from opsin.core.errors import BadParameter

MAX_TILES = 16
LEAST_LOW = 64
"""Tokens that an image of `detail: low` has at least; otherwise it has a quarter of the model's most."""
Rect = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""
Detail = Literal["auto", "low", "high", "original", ""]

_LENGTH = re.compile(r"\d{1,6}|\d{1,3}(\.\d{1,6})?%")
_GRID = re.compile(r"([1-9]\d?)x([1-9]\d?)")


def _region(text: str) -> str:
    words = "".join(text.split()).split(",")
    if len(words) != 4 or not all(map(_LENGTH.fullmatch, words)):
        raise ValueError("not left,top,width,height: four numbers in pixels as 10,20,300,200, or in percent as 10%,…")
    if any(float(word.rstrip("%")) == 0 for word in words[2:]):
        raise ValueError("width and height of the part must be more than 0")
    return ",".join(words)


def _tiles(text: str) -> str:
    found = _GRID.fullmatch(text.strip().lower())
    if found is None or not 2 <= int(found[1]) * int(found[2]) <= MAX_TILES:
        raise ValueError(f"not columns and rows of 2 to {MAX_TILES} tiles, as 2x2")
    return found[0]


Region = Annotated[
    str,
    BeforeValidator(lambda value: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value),
    AfterValidator(_region),
]
Tiles = Annotated[str, AfterValidator(_tiles)]


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """What a vision encoder makes of the sizes of images.

    `edge`: pixels a side of what it sees of any image (0: it depends on the image). `cell`: where it keeps an image's
    size, the pixels a side that become one token (0: it does not); then `least` and `most` are the tokens that one
    image can have. `usual` is the budget in tokens of an image of which nobody says one (None: `most`).
    """

    edge: int = 0
    cell: int = 0
    least: int = 0
    most: int = 0
    usual: int | None = None


class ImageOptions(BaseModel):
    """How one image is shown to the model; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int | None = Field(None, ge=1, description="most tokens of an image, if the model can choose")
    detail: Detail | None = None
    region: Region | None = Field(
        None, description="look at this part of each image: left,top,width,height in pixels, or in percent as 10%,…"
    )
    tiles: Tiles | None = Field(None, description="show each image whole, then cut into columns and rows, as 2x2")

    @property
    def count(self) -> int:
        """How many images the model gets to see of one."""
        columns, rows = self._grid
        return 1 + columns * rows

    def split(self) -> tuple[ImageOptions, ImageOptions]:
        """The part and its tiles, for which nothing of the model need be known; and all the rest."""
        cut = {"region": self.region, "tiles": self.tiles}
        return ImageOptions(**cut), self.model_copy(update=dict.fromkeys(cut))

    def fields(self) -> dict[str, Any]:
        """What is asked for, by the names of a request's fields."""
        return {f"image_{name}": value for name, value in self if value is not None}

    @property
    def _grid(self) -> tuple[int, int]:
        columns, _, rows = (self.tiles or "0x0").partition("x")
        return int(columns), int(rows)

    def parts(self, width: int, height: int) -> list[Rect]:
        """What is cut out of an upright image of this size: all or a part of it, then its tiles, row by row.

        Raises BadParameter where the part does not lie in the image, or is too small for the tiles.
        """
        left, top, across, down = whole = self._part(width, height)
        columns, rows = self._grid
        if across < columns or down < rows:
            raise BadParameter(f"{across} by {down} pixels are too few for {self.tiles} tiles: ask for fewer.")
        xs, ys = ([size * at // max(1, n) for at in range(n + 1)] for size, n in ((across, columns), (down, rows)))
        tiles = [(x, right, y, bottom) for y, bottom in pairwise(ys) for x, right in pairwise(xs)]
        return [whole, *((left + x, top + y, right - x, bottom - y) for x, right, y, bottom in tiles)]

    def _part(self, width: int, height: int) -> Rect:
        if self.region is None:
            return 0, 0, width, height
        found, words = list[int](), self.region.split(",")
        for at, size, of in zip(words[:2], words[2:], (width, height), strict=True):
            first, length = _pixels(at, of), _pixels(size, of)
            if at.endswith("%") and size.endswith("%"):  # where the next part begins, this one ends
                length = round((float(at[:-1]) + float(size[:-1])) * of / 100) - first
            found += [first, max(1, length)]
        left, across, top, down = found
        if left + across > width or top + down > height:
            raise BadParameter(f"The region {self.region} does not lie in the image of {width} by {height} pixels.")
        return left, top, across, down

    def budget(self, sizes: ImageSizes) -> int | None:
        """Tokens that an image may have, None where nobody says it."""
        low = max(LEAST_LOW, sizes.most // 4) if self.detail == "low" else None
        wanted = [limit for limit in (self.max_tokens, low, sizes.usual) if limit]
        return min(*wanted, sizes.most or wanted[0], wanted[0]) if wanted else None


def _pixels(word: str, of: int) -> int:
    return round(float(word[:-1]) * of / 100) if word.endswith("%") else int(word)


def options_of(*given: object) -> ImageOptions:
    """What the fields `detail`, `image_max_tokens` and so on of these say together; the first who says one counts."""
    found: dict[str, Any] = {}
    for name in ImageOptions.model_fields:
        field = name if name == "detail" else f"image_{name}"
        found[name] = next(filter(None, (getattr(one, field, None) for one in given)), None)
    return ImageOptions(**found)


AS_IT_IS, ANY_SIZES = ImageOptions(), ImageSizes()
"""A whole image in as many pixels as it has, for a model of which nothing is known."""
