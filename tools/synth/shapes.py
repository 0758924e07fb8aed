"""All shapes that can be written: those of the package, and a tiny one of each other family.

The tiny shapes keep the structure of what they are named for, and the ratios that matter: LLaVA-1.6's five grids,
Qwen2-VL's rope sections of 2:3:3, an image of Gemma 3 that is wider than its sliding window.
"""

from __future__ import annotations

from dataclasses import replace

from opsin.models.shapes import SHAPES as PACKAGE_SHAPES
from opsin.models.shapes import PairShape

_TINY = PACKAGE_SHAPES["tiny"]

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

SHAPES: dict[str, PairShape] = {**PACKAGE_SHAPES, **{shape.name: shape for shape in _OTHER_FAMILIES}}
