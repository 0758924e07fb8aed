"""Sizes of random-weight pairs, as plain data: a new shape is a new row, never new code.

Sources: LLaVA-1.5 7B and 13B are Vicuna 1.5 with CLIP ViT-L/14 at 336 px (arXiv 2310.03744 and the models' published
`config.json`). Their published projector files hold 23 of CLIP's 24 blocks and llama.cpp runs all but the last of
those a file holds (`tools/mtmd/models/llava.cpp`), so 23 is what a fair measurement needs. The tiny shapes of the
other families keep the structure of what they are named for, and the ratios that matter: LLaVA-1.6's five grids,
Qwen2-VL's rope sections of 2:3:3, Gemma 3's picture that is wider than its sliding window is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["llava", "qwen2vl", "gemma3"]


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A CLIP-like vision transformer. `image_size` and `patch_size` are pixels, the rest widths and counts.

    `merge` patches a side become one image token. `grids` are the sizes in pixels that a large picture is cut into
    tiles of `image_size` from; without any, a picture is one tile.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    merge: int = 1
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def patches(self) -> int:
        """Patches of one picture, or tile, of `image_size`: its image tokens where none are merged."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class TextShape:
    """A language model. `context` is the trained length in tokens; the rest are widths and counts.

    `sections` are the pairs of a head's values that rotate by time, height, width and one more (M-RoPE). `window` is
    the sliding window in tokens of every other layer, 0 for none.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int
    sections: tuple[int, int, int, int] | None = None
    window: int = 0

    @property
    def kv_width(self) -> int:
        """Width of keys and of values."""
        return self.width // self.heads * self.kv_heads


@dataclass(frozen=True, slots=True)
class PairShape:
    """A vision encoder, a projector and a language model, put together as `family` does.

    `contrast` widens the random weights that attention scores and next-token scores come from. At 1 a random model
    looks at all positions nearly alike, so a wrong position would hardly show: comparisons need more.
    """

    name: str
    vision: VisionShape
    text: TextShape
    note: str
    family: Family = "llava"
    contrast: float = 1.0


_VIT_L_336 = VisionShape(image_size=336, patch_size=14, width=1024, layers=23, heads=16, feed_forward=4096)
_TINY_VIT = VisionShape(image_size=56, patch_size=14, width=64, layers=2, heads=4, feed_forward=128)
_TINY_TEXT = TextShape(width=64, layers=2, heads=4, kv_heads=2, feed_forward=128, vocabulary=512, context=4096)

_ALL = (
    PairShape("tiny", _TINY_VIT, _TINY_TEXT, "16 image tokens; written in a moment, for tests"),
    PairShape(
        "small",
        VisionShape(image_size=336, patch_size=14, width=768, layers=12, heads=12, feed_forward=3072),
        TextShape(width=1024, layers=12, heads=16, kv_heads=8, feed_forward=2816, vocabulary=32_000, context=8192),
        "576 image tokens and 0.2 B parameters; the pair Opsin's measurements are made on",
    ),
    PairShape(
        "medium",
        VisionShape(image_size=336, patch_size=14, width=1024, layers=8, heads=16, feed_forward=4096),
        TextShape(width=1536, layers=16, heads=24, kv_heads=8, feed_forward=4096, vocabulary=32_000, context=8192),
        "576 image tokens and 0.5 B parameters; a second size to check predictions on",
    ),
    PairShape(
        "llava-1.5-7b",
        _VIT_L_336,
        TextShape(width=4096, layers=32, heads=32, kv_heads=32, feed_forward=11_008, vocabulary=32_000, context=4096),
        "576 image tokens and 6.7 B parameters; the size of LLaVA-1.5 7B",
    ),
    PairShape(
        "llava-1.5-13b",
        _VIT_L_336,
        TextShape(width=5120, layers=40, heads=40, kv_heads=40, feed_forward=13_824, vocabulary=32_000, context=4096),
        "576 image tokens and 13 B parameters; the size of LLaVA-1.5 13B",
    ),
    PairShape(
        "llava-1.6-tiny",
        replace(_TINY_VIT, grids=((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))),
        _TINY_TEXT,
        "tiles: 16 image tokens for the whole picture and for each of up to four tiles of it",
        contrast=2.0,
    ),
    PairShape(
        "qwen2vl-tiny",
        replace(_TINY_VIT, image_size=560, merge=2),
        replace(_TINY_TEXT, sections=(2, 3, 3, 0)),
        "M-RoPE: positions in time, height and width; image tokens by the picture's size",
        "qwen2vl",
        2.0,
    ),
    PairShape(
        "gemma3-tiny",
        replace(_TINY_VIT, image_size=224, merge=2),
        replace(_TINY_TEXT, window=48),
        "64 image tokens that attend in both directions; every other layer has a sliding window of 48 tokens",
        "gemma3",
        2.0,
    ),
)

SHAPES: dict[str, PairShape] = {shape.name: shape for shape in _ALL}
