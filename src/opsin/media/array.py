"""NumPy arrays as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture
from opsin.media.decode import Pixels
from opsin.media.flatten import flatten
from opsin.media.words import check_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from opsin.core.settings import MediaSettings

_SHAPES = "(height, width), (height, width, 3) or (height, width, 4)"


def decode_array(array: NDArray[Any], name: str, settings: MediaSettings) -> Pixels:
    """Take an array of shape (h, w), (h, w, 3) or (h, w, 4): uint8, uint16 (the high byte counts), or floats 0..1.

    Raises BadPicture for another shape, type or range, PictureTooLarge beyond the limits.
    """
    import numpy as np
    from PIL import Image

    shape = array.shape
    if len(shape) not in {2, 3} or (len(shape) == 3 and shape[2] not in {3, 4}):
        hint = "; move the colours to the end" if len(shape) == 3 and shape[0] in {3, 4} else ""
        raise BadPicture(f"An array of shape {tuple(shape)} is no picture; its shape must be {_SHAPES}{hint}.")
    height, width = int(shape[0]), int(shape[1])
    check_size(width, height, name, settings)
    if array.dtype == np.uint8:
        samples = array
    elif array.dtype == np.uint16:
        samples = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        # written so that a NaN fails it too
        if not (float(array.min()) >= 0 and float(array.max()) <= 1):
            raise BadPicture(
                "An array of floats must hold values from 0 to 1 only; divide it by its largest value, or use uint8."
            )
        samples = np.rint(array.astype(np.float32, copy=False) * 255).astype(np.uint8)
    else:
        raise BadPicture(f"An array of {array.dtype} is no picture; use uint8, uint16, or floats from 0 to 1.")
    image, notes = flatten(Image.fromarray(np.ascontiguousarray(samples)), name)
    return Pixels(image, "array", width, height, notes=notes)
