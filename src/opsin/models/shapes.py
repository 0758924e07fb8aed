"""Sizes of LLaVA-like pairs as plain data, for predictions without a file: a new shape is a new row.

`tools/synth.py` in the repository writes random-weight pairs of these shapes.

Sources: LLaVA-1.5 7B and 13B are Vicuna 1.5 with CLIP ViT-L/14 at 336 px (arXiv 2310.03744 and the models' published
`config.json`). Their published projector files hold 23 of CLIP's 24 blocks, and llama.cpp runs all but the last block
of a file (`tools/mtmd/models/llava.cpp`), so 23 is what a fair measurement needs. TinyLlama-1.1B: the `config.json` of
TinyLlama-1.1B-Chat-v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llava", "qwen2vl", "gemma3"]
WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A CLIP-like vision transformer. `image_size` and `patch_size` are pixels, the rest widths and counts.

    A square of `merge` × `merge` patches becomes one image token. `grids` are the sizes in pixels that a large image is
    resized to before it is cut into tiles of `image_size`; without grids an image is one tile.
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
        """Patches of one image or tile of `image_size`; its image tokens if none are merged."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class TextShape:
    """A language model. `context` is the trained length in tokens; the rest are widths and counts.

    `sections` are the pairs of a head's values that rotate by time, height, width and one more (M-RoPE). `window` is
    the sliding window of every other layer in tokens; 0 means none.
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
    """A vision encoder, a projector and a language model, joined as `family` joins them.

    `contrast` widens the random weights behind attention scores and logits. At 1 a random model attends to all
    positions almost equally, so a wrong position would hardly show; comparisons need more.
    """

    name: str
    vision: VisionShape
    text: TextShape
    note: str
    family: Family = "llava"
    contrast: float = 1.0


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
        "576 image tokens and 0.2 B parameters",
    ),
    PairShape(
        "medium",
        VisionShape(image_size=336, patch_size=14, width=1024, layers=8, heads=16, feed_forward=4096),
        TextShape(width=1536, layers=16, heads=24, kv_heads=8, feed_forward=4096, vocabulary=32_000, context=8192),
        "576 image tokens and 0.5 B parameters",
    ),
    PairShape(
        "tinyllama-1.1b",
        _VIT_L_336,
        TextShape(width=2048, layers=22, heads=32, kv_heads=4, feed_forward=5632, vocabulary=32_000, context=2048),
        "576 image tokens and 1.1 B parameters; TinyLlama-1.1B with the vision encoder of LLaVA-1.5",
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
