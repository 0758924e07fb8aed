"""All shapes that can be written: those of the package, and a tiny one of each other family.

The tiny shapes keep the structure of what they are named for, and the ratios that matter: LLaVA-1.6's five grids,
Qwen2-VL's rope sections of 2:3:3, an image of Gemma 3 that is wider than its sliding window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from opsin.models import shapes as package

Family = Literal["llava", "qwen2vl", "gemma3"]
WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


@dataclass(frozen=True, slots=True)
class VisionShape(package.VisionShape):
    """With how `merge` × `merge` patches become one image token.

    A large image is resized to one of `grids` (pixels) and cut into tiles of `image_size`; without grids it is one.
    """

    merge: int = 1
    grids: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TextShape(package.TextShape):
    """With the pairs of a head's values that rotate by time, height, width and one more (M-RoPE), as `sections`.

    `window` (of every other layer; 0 for none) is in tokens.
    """

    sections: tuple[int, int, int, int] | None = None
    window: int = 0


@dataclass(frozen=True, slots=True)
class PairShape:
    """A vision encoder, a projector and a language model, joined as `family` joins them.

    `contrast` widens the random weights behind attention scores and logits: at 1 a wrong position would hardly show.
    """

    name: str
    vision: VisionShape
    text: TextShape
    family: Family = "llava"
    contrast: float = 1.0


_PACKAGE = {
    name: PairShape(name, VisionShape(**asdict(shape.vision)), TextShape(**asdict(shape.text)))
    for name, shape in package.SHAPES.items()
}
_TINY = _PACKAGE["tiny"]

_OTHER_FAMILIES = (
    replace(
        _TINY,
        name="llava-1.6-tiny",
        vision=replace(_TINY.vision, grids=((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))),
        contrast=2.0,
    ),
    PairShape(
        "qwen2vl-tiny",
        replace(_TINY.vision, image_size=560, merge=2),
        replace(_TINY.text, sections=(2, 3, 3, 0)),
        "qwen2vl",
        2.0,
    ),
    PairShape(
        "gemma3-tiny",
        replace(_TINY.vision, image_size=224, merge=2),
        replace(_TINY.text, window=48),
        "gemma3",
        2.0,
    ),
)

SHAPES: dict[str, PairShape] = {**_PACKAGE, **{shape.name: shape for shape in _OTHER_FAMILIES}}
