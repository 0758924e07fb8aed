"""Any Pillow mode and any NumPy array in, 8-bit RGB on white out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture
from opsin.media.limits import check_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image

    from opsin.core.settings import MediaSettings

_WHITE = (255, 255, 255)
_SHAPES = "(height, width), (height, width, 3) or (height, width, 4)"
_STRIP = 2**20  # samples that are scaled at a time


def flatten(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn a loaded image of any mode into RGB, transparent places white, with notes for the user.

    Sixteen-bit samples keep their high byte, as Pillow does for 16-bit colours. Integers and floats of 32 bits have no
    agreed range: floats from 0 to 1 and numbers from 0 to 255 or 65,535 are taken as such, any other range is
    stretched, and a note says so. Raises BadPicture for samples that are not finite numbers.
    """
    if image.mode.startswith("I;16"):
        return _from_sixteen_bits(image), ()
    if image.mode in {"I", "F"}:
        return _from_wide(image, name)
    if image.has_transparency_data:
        return _on_white(image), ()
    return (image if image.mode == "RGB" else image.convert("RGB")), ()


def flatten_array(array: NDArray[Any], name: str, settings: MediaSettings) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn an array (h, w), (h, w, 3) or (h, w, 4) into RGB: uint8, uint16 (the high byte counts) or floats 0..1.

    Raises BadPicture for another shape, type or range, PictureTooLarge beyond the limits.
    """
    import numpy as np
    from PIL import Image as Pil

    shape = array.shape
    if len(shape) not in {2, 3} or (len(shape) == 3 and shape[2] not in {3, 4}):
        hint = "; move the colours to the end" if len(shape) == 3 and shape[0] in {3, 4} else ""
        raise BadPicture(f"An array of shape {tuple(shape)} is no picture; its shape must be {_SHAPES}{hint}.")
    check_size(shape[1], shape[0], name, settings)
    if array.dtype == np.uint8:
        samples = array
    elif array.dtype == np.uint16:
        samples = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        # Written so that a NaN fails it too.
        if not (float(array.min()) >= 0 and float(array.max()) <= 1):
            raise BadPicture(
                "An array of floats must hold values from 0 to 1 only; divide it by its largest value, or use uint8."
            )
        samples = np.rint(array.astype(np.float32, copy=False) * 255).astype(np.uint8)
    else:
        raise BadPicture(f"An array of {array.dtype} is no picture; use uint8, uint16, or floats from 0 to 1.")
    return flatten(Pil.fromarray(np.ascontiguousarray(samples)), name)


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image as Pil

    values = np.asarray(image).astype(np.uint16, copy=False)
    tags = getattr(image, "tag_v2", {})
    grey = (values >> (4 if tags.get(258) == (12,) else 8)).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white, which Pillow leaves to us at 16 bits
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Pil.fromarray(grey).convert("RGB")


def _from_wide(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    import numpy as np
    from PIL import Image as Pil

    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN makes both a NaN
        raise BadPicture(f"{name} holds values that are not finite numbers; replace them and save it again.")
    scale, note = _choose_scale(low, high, floats=values.dtype.kind == "f")
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP // values.shape[1])  # in strips, as the way there takes eight bytes a sample and more
    for top in range(0, len(values), rows):
        grey[top : top + rows] = np.rint(scale(values[top : top + rows]))
    if getattr(image, "tag_v2", {}).get(262) == 0:
        np.subtract(255, grey, out=grey)
    return Pil.fromarray(grey).convert("RGB"), (note,) if note else ()


def _choose_scale(low: float, high: float, *, floats: bool) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], str]:
    """How samples from `low` to `high` come to 0..255; the note is empty when their range told what they mean."""
    import numpy as np

    if floats and low >= 0 and high <= 1:
        return lambda values: values * 255, ""
    if low >= 0 and high <= 255:
        return lambda values: values, ""
    if low >= 0 and high <= 65_535:
        return lambda values: values.astype(np.int64) >> 8, ""
    factor = 255 / ((high - low) or 1)
    note = f"values from {low:g} to {high:g} were stretched from black to white"
    return lambda values: (values.astype(np.float64) - low) * factor, note


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image as Pil

    if image.mode == "La":  # Pillow knows no direct way from here
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    ground = Pil.new("RGB", image.size, _WHITE)
    ground.paste(image, mask=image.getchannel("A"))
    return ground
