"""From an upright image to what the model gets of it: a part, tiles, and no more pixels than its tokens are worth."""

import dataclasses
import hashlib
import math
import struct
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadParameter
from opsin.core.image_options import ImageOptions, ImageSizes
from opsin.core.request import Image

if TYPE_CHECKING:
    import PIL.Image

_LOW_EDGE = 512  # pixels of `detail: low` for models that cut images into tiles, as OpenAI's


def size_within(width: int, height: int, budget: int, cell: int) -> tuple[int, int]:
    """The size in whole cells that keeps to a budget of tokens; as it is, if it does so already.

    A model that keeps sizes rounds them to cells of `cell` pixels a side, each a token (`calc_size_preserved_ratio` of
    llama.cpp): it leaves what is made of whole cells as it is.
    """
    if _tokens(width, height, cell) <= budget:
        return width, height
    shrink = math.sqrt(width * height / budget)
    across, down = (min(budget, max(1, int(edge / shrink))) * cell for edge in (width, height))
    return across, down


def _tokens(width: int, height: int, cell: int) -> int:
    return math.prod(max(1, int(edge / cell + 0.5)) for edge in (width, height))


def fitted(width: int, height: int, options: ImageOptions, sizes: ImageSizes) -> tuple[int, int, tuple[str, ...]]:
    """The size at which an image is shown, and notes for the user about what the options do to it, or do not."""
    budget, longer = options.budget(sizes), max(width, height)
    if budget is None:
        return width, height, ()
    if sizes.cell:
        size = size_within(width, height, budget, sizes.cell)
        notes = () if size == (width, height) else (f"resized to {size[0]} by {size[1]} pixels for {budget:,} tokens",)
        # What has fewer is made larger, and rounded up.
        if budget < 2 * sizes.least and _tokens(*size, sizes.cell) < sizes.least:
            notes = (*notes, f"the model makes {sizes.least} tokens or more of an image, so of this one, too")
        return *size, notes
    if options.detail == "low" and not sizes.edge:
        if longer <= _LOW_EDGE:
            return width, height, ()
        width, height = (max(1, edge * _LOW_EDGE // longer) for edge in (width, height))
        return width, height, (f"shrunk to {width} by {height} pixels",)
    what = f"sees every image at {sizes.edge} by {sizes.edge} pixels" if sizes.edge else "cuts images into fixed tiles"
    return width, height, (f"a limit on its tokens changes nothing: the model {what}",)


def shown(
    flat: "PIL.Image.Image", whole: tuple[int, int], image: Image, options: ImageOptions, sizes: ImageSizes
) -> list[Image]:
    """The images that the model gets of a flat, upright one; `image` says all but pixels and sizes.

    `whole` is the file's upright width and height; `flat` is smaller where it was read in part. Then it is not cut.
    """
    from PIL.Image import Resampling

    made = []
    for rect in options.parts(*whole):
        left, top, across, down = rect
        is_part, notes = rect != (0, 0, *whole), image.notes
        width, height, more = fitted(across, down, options, sizes)
        part = flat
        if is_part:
            part = flat.crop((left, top, left + across, top + down))
            notes = (*notes, f"the part of {across} by {down} pixels at {left}, {top} was cut out")
        if (width, height) != (across, down):
            part = part.resize((width, height), Resampling.LANCZOS)
        rgb = part.tobytes()
        digest = hashlib.sha256(struct.pack("<II", *part.size))  # 32 bit, little-endian
        digest.update(rgb)
        one = dataclasses.replace(image, rgb=rgb, width=part.width, height=part.height, sha256=digest.hexdigest())
        source_size = whole if is_part or part.size != whole else None
        region = rect if is_part else None
        made.append(dataclasses.replace(one, notes=(*notes, *more), source_size=source_size, region=region))
        image = dataclasses.replace(image, fetch_ms=0.0, decode_ms=0.0)  # the tiles took no time of their own
    return made


def shown_again(image: Image, options: ImageOptions, sizes: ImageSizes) -> list[Image]:
    """An image that was loaded before. Raises BadParameter for a part of one that is a part, or smaller, already."""
    is_cut = bool(options.region or options.tiles)
    if is_cut and image.source_size is not None:
        raise BadParameter("The image was cut or made smaller when it was loaded: give the file to have a part of it.")
    width, height, more = fitted(image.width, image.height, options, sizes)
    if (width, height) == (image.width, image.height) and not is_cut:
        notes = tuple(dict.fromkeys((*image.notes, *more)))
        return [image if notes == image.notes else dataclasses.replace(image, notes=notes)]
    from PIL import Image as Pil

    pixels: Any = image.rgb
    flat = Pil.frombuffer("RGB", (image.width, image.height), pixels, "raw", "RGB", 0, 1)
    made = shown(flat, flat.size, image, options, sizes)
    if image.source_size is None:
        return made
    return [dataclasses.replace(one, source_size=image.source_size, region=image.region) for one in made]
