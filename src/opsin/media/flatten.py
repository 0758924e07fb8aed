"""Any Pillow mode in, 8-bit RGB on white out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.core.errors import BadPicture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

WHITE = (255, 255, 255)


def flatten(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Turn a loaded image of any mode into RGB, transparent places white, with notes for the user.

    Sixteen-bit samples keep their high byte, as Pillow does for 16-bit colours. Whole numbers and fractions of 32 bits
    have no agreed range: fractions from 0 to 1 and numbers from 0 to 255 or 65,535 are taken as such, any other range
    is stretched, and a note says so. Raises
    BadPicture for samples that are no finite numbers.
    """
    if image.mode.startswith("I;16"):
        return _sixteen_bit(image)
    if image.mode in {"I", "F"}:
        return _wide(image, name)
    if image.has_transparency_data:
        return _on_white(image), ()
    return (image if image.mode == "RGB" else image.convert("RGB")), ()


def scale_to_bytes(values: NDArray[Any]) -> tuple[NDArray[np.uint8], str]:
    """Bring 32-bit samples to 0..255; the sentence is empty when their range told what they mean."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8), ""
    if low >= 0 and high <= 255:
        return np.rint(values).astype(np.uint8), ""
    if low >= 0 and high <= 65_535:
        return (values.astype(np.int64) >> 8).astype(np.uint8), ""
    stretched = (values.astype(np.float64) - low) * (255 / ((high - low) or 1))
    return np.rint(stretched).astype(np.uint8), f"values from {low:g} to {high:g} were stretched from black to white"


def _sixteen_bit(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
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
    return Pil.fromarray(grey).convert("RGB"), ()


def _wide(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    import numpy as np
    from PIL import Image as Pil

    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadPicture(f"{name} holds values that are not finite numbers; replace them and save it again.")
    grey, note = scale_to_bytes(values)
    if getattr(image, "tag_v2", {}).get(262) == 0:
        grey = 255 - grey
    return Pil.fromarray(grey).convert("RGB"), (note,) if note else ()


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image as Pil

    if image.mode == "La":  # Pillow knows no straight way from here
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    ground = Pil.new("RGB", image.size, WHITE)
    ground.paste(image, mask=image.getchannel("A"))
    return ground
