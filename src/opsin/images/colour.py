"""Any Pillow mode and any NumPy array in, 8-bit RGB on white out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadImage
from opsin.images.source import check_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from opsin.core.settings import ImageSettings

_SHAPES = "(height, width), (height, width, 3) or (height, width, 4), colours last"
# Tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262


def flatten(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn a loaded image of any mode into RGB, transparent places white, with notes for the user.

    Sixteen-bit samples keep their high byte, as Pillow does for 16-bit colours. Integers and floats of 32 bits have no
    agreed range: floats from 0 to 1 and numbers from 0 to 255 or 65,535 are taken as such, any other range is
    stretched, and a note says so. Raises BadImage for samples that are not finite numbers.
    """
    from PIL import Image as Pil

    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        grey, notes = _grey(image, name)
        return Pil.fromarray(grey).convert("RGB"), notes
    if not image.has_transparency_data:
        return (image if image.mode == "RGB" else image.convert("RGB")), ()
    if image.mode == "La":  # Pillow knows no direct way from here to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    ground = Pil.new("RGB", image.size, "white")
    ground.paste(image, mask=image.getchannel("A"))
    return ground, ()


def array_image(array: NDArray[Any], settings: ImageSettings) -> Image.Image:
    """Take an array (h, w), (h, w, 3) or (h, w, 4) as an image: uint8, uint16 (the high byte counts) or floats 0..1.

    Raises BadImage for another shape, type or range, ImageTooLarge beyond the limits.
    """
    import numpy as np
    from PIL import Image as Pil

    shape = array.shape
    if len(shape) not in {2, 3} or (len(shape) == 3 and shape[2] not in {3, 4}):
        raise BadImage(f"An array of shape {tuple(shape)} is no image; its shape must be {_SHAPES}.")
    check_size(shape[1], shape[0], "The array", settings)
    if array.dtype == np.uint8:
        samples = array
    elif array.dtype == np.uint16:
        samples = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        # Written so that a NaN fails it too.
        if not (float(array.min()) >= 0 and float(array.max()) <= 1):
            raise BadImage(
                "An array of floats must hold values from 0 to 1 only; divide it by its largest value, or use uint8."
            )
        samples = np.rint(array.astype(np.float32, copy=False) * 255).astype(np.uint8)
    else:
        raise BadImage(f"An array of {array.dtype} is no image; use uint8, uint16, or floats from 0 to 1.")
    return Pil.fromarray(np.ascontiguousarray(samples))


def _grey(image: Image.Image, name: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Samples of more than 8 bits as uint8 [height, width], with notes for the user."""
    import numpy as np

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode in {"I", "F"}:
        grey, notes = _grey_of_wide(values, name)
    else:
        grey, notes = (values >> (4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8)).astype(np.uint8), ()
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow leaves to us beyond 8 bits
        np.subtract(255, grey, out=grey)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return grey, notes


def _grey_of_wide(values: NDArray[Any], name: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Samples of 32 bits as 8, and a note where their range does not tell what they mean."""
    import numpy as np

    notes: tuple[str, ...] = ()
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN makes both a NaN
        raise BadImage(f"{name} holds values that are not finite numbers; replace them and save it again.")
    usual = (1, 255, 65_535) if values.dtype.kind == "f" else (255, 65_535)
    black, white = 0.0, next((float(top) for top in usual if high <= top), 0.0)
    if low < 0 or not white:
        black, white = low, high if high > low else low + 1
        notes = (f"values from {low:g} to {high:g} were stretched from black to white",)
    grey = np.empty(values.shape, np.uint8)
    for row, samples in zip(grey, values, strict=True):  # row by row, as float64 takes eight bytes a sample
        row[:] = np.rint((samples.astype(np.float64) - black) * (255 / (white - black)))
    return grey, notes
