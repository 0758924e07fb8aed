"""Sizes of random-weight pairs, as plain data: a new shape is a new row, never new code.

Sources: LLaVA-1.5 7B and 13B are Vicuna 1.5 with CLIP ViT-L/14 at 336 px (arXiv 2310.03744 and the models' published
`config.json`). Their published projector files hold 23 of CLIP's 24 blocks and llama.cpp runs all but the last of
those a file holds (`tools/mtmd/models/llava.cpp`), so 23 is what a fair measurement needs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A CLIP-like vision transformer. `image_size` and `patch_size` are pixels, the rest widths and counts."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    feed_forward: int

    @property
    def patches(self) -> int:
        """Image tokens of one picture."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class TextShape:
    """A `llama` language model. `context` is the trained length in tokens; the rest are widths and counts."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int

    @property
    def kv_width(self) -> int:
        """Width of keys and of values."""
        return self.width // self.heads * self.kv_heads


@dataclass(frozen=True, slots=True)
class PairShape:
    """A vision encoder, a two-layer projector and a language model."""

    name: str
    vision: VisionShape
    text: TextShape
    note: str


_VIT_L_336 = VisionShape(image_size=336, patch_size=14, width=1024, layers=23, heads=16, feed_forward=4096)

_ALL = (
    PairShape(
        "tiny",
        VisionShape(image_size=56, patch_size=14, width=64, layers=2, heads=4, feed_forward=128),
        TextShape(width=64, layers=2, heads=4, kv_heads=2, feed_forward=128, vocabulary=512, context=4096),
        "16 image tokens; written in a moment, for tests",
    ),
    PairShape(
        "small",
        VisionShape(image_size=336, patch_size=14, width=768, layers=12, heads=12, feed_forward=3072),
        TextShape(width=1024, layers=12, heads=16, kv_heads=8, feed_forward=2816, vocabulary=32_000, context=8192),
        "576 image tokens and 0.2 B parameters; the pair Opsin's measurements are made on",
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
)

SHAPES: dict[str, PairShape] = {shape.name: shape for shape in _ALL}
