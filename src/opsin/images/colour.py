"""Any Pillow mode and any NumPy array in, 8-bit sRGB without transparency out."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadImage
from opsin.core.settings import ImageSettings
from opsin.images.source import check_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

_SHAPES = "(height, width), (height, width, 3) or (height, width, 4), colours last"
# Tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
# Bytes of an ICC profile; those of printing presses have up to three million. Levels within which colours are the same.
_MAX_PROFILE, _SAME = 4 * 2**20, 2
# Grounds for transparent images, the usual one first; levels between ground and image from which on it is seen; and
# opacity below which a pixel counts for nothing.
_GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
_CONTRAST, _FAINT = 40, 32


def flatten(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn a loaded image of any mode into sRGB without transparency, with notes for the user; `image` is not changed.

    A colour profile (ICC) is applied. What is transparent shows a ground on which the rest can be seen: white, unless
    the rest is mostly light. Sixteen-bit samples keep their high byte, as Pillow does for 16-bit colours. Integers and
    floats of 32 bits have no agreed range: floats from 0 to 1 and numbers from 0 to 255 or 65,535 are taken as such,
    any other range is stretched, and a note says so. Raises BadImage for samples that are not finite numbers.
    """
    profile, alpha = image.info.get("icc_profile"), None
    notes: tuple[str, ...] = ()
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        image, notes = _grey(image, name)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow knows no direct way from here to RGBA
            image = image.convert("LA")
        whole = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = whole.getchannel("A")
        image = image.convert("L") if image.mode in {"L", "LA"} else whole.convert("RGB")
    if profile:
        image, more = _to_srgb(image, profile)
        notes = (*notes, *more)
    flat = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        from PIL import ImageChops

        ground = _ground(flat, alpha)
        flat.paste(_GROUNDS[ground], mask=ImageChops.invert(alpha))  # a copy of `image`, in any case
        notes = (*notes, f"transparent parts were filled with {ground}")
    return flat, notes


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The image's colours in sRGB by its ICC profile, and a note; an sRGB image comes back as it is, without one."""
    from PIL import Image as Pil
    from PIL import ImageChops, ImageCms

    if image.mode in {"P", "PA", "RGBX"}:
        image = image.convert("RGB")
    if image.mode not in {"RGB", "L", "CMYK"}:
        return image, ()
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile[:_MAX_PROFILE]))
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB", intent, flags)
        label = (ImageCms.getProfileDescription(source) or "").strip()[:60]
    except Exception:  # noqa: BLE001 - a damaged profile may raise anything, and does not spoil the image
        return image, ("the colour profile is damaged, too large or for another kind of image, and was not applied",)
    if image.mode != "CMYK":
        # Profiles of sRGB differ in name and bytes: what a few hundred colours become tells them from others.
        colours = itertools.chain(*itertools.product(range(0, 256, 51), repeat=3))
        probe = Pil.frombytes("RGB", (216, 1), bytes(colours)).convert(image.mode)
        change: Any = ImageChops.difference(transform.apply(probe), probe.convert("RGB")).getextrema()
        if max(high for _, high in change) <= _SAME:
            return image, ()
    return transform.apply(image), (f"colours were converted to sRGB from the profile {label or 'in the file'}",)


def _ground(image: Image.Image, alpha: Image.Image) -> str:
    """The ground for a partly transparent image: white, unless less than three quarters of the image show on it."""
    seen = image.convert("L").histogram(alpha.point([0] * _FAINT + [255] * (256 - _FAINT)))
    shown = {
        name: sum(count for level, count in enumerate(seen) if abs(level - ground[0]) >= _CONTRAST)
        for name, ground in _GROUNDS.items()
    }
    return "white" if shown["white"] >= 0.75 * sum(seen) else max(shown, key=lambda name: shown[name])


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


def _grey(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Samples of more than 8 bits as an image of 8, mode L or LA, with notes for the user."""
    import numpy as np
    from PIL import Image as Pil

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode in {"I", "F"}:
        grey, notes = _grey_of_wide(values, name)
    else:
        grey, notes = (values >> (4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8)).astype(np.uint8), ()
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white, which Pillow leaves to us beyond 8 bits
        np.subtract(255, grey, out=grey)
    clear, made = image.info.get("transparency"), Pil.fromarray(grey)
    if isinstance(clear, int):
        made = Pil.merge("LA", (made, Pil.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    return made, notes


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
