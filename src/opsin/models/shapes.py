"""Sizes of LLaVA-like pairs as plain data, for predictions without a file; `tools/synth.py` writes files of them.

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
    """A CLIP-like vision transformer, in pixels, widths and counts; `merge` × `merge` patches become one image token.

    A large image is resized to one of `grids` (pixels) and cut into tiles of `image_size`; without grids it is one.
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
    """A language model, in widths and counts. `context` and `window` (of every other layer; 0 for none) are tokens.

    `sections` are the pairs of a head's values that rotate by time, height, width and one more (M-RoPE).
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

    `contrast` widens the random weights behind attention scores and logits: at 1 a wrong position would hardly show.
    """

    name: str
    vision: VisionShape
    text: TextShape
    family: Family = "llava"
    contrast: float = 1.0


_VIT_L_336 = VisionShape(336, 14, 1024, 23, 16, 4096)

SHAPES: dict[str, PairShape] = {
    shape.name: shape
    for shape in (
        PairShape("tiny", VisionShape(56, 14, 64, 2, 4, 128), TextShape(64, 2, 4, 2, 128, 512, 4096)),
        PairShape("small", VisionShape(336, 14, 768, 12, 12, 3072), TextShape(1024, 12, 16, 8, 2816, 32_000, 8192)),
        PairShape("medium", VisionShape(336, 14, 1024, 8, 16, 4096), TextShape(1536, 16, 24, 8, 4096, 32_000, 8192)),
        PairShape("tinyllama-1.1b", _VIT_L_336, TextShape(2048, 22, 32, 4, 5632, 32_000, 2048)),
        PairShape("llava-1.5-7b", _VIT_L_336, TextShape(4096, 32, 32, 32, 11_008, 32_000, 4096)),
        PairShape("llava-1.5-13b", _VIT_L_336, TextShape(5120, 40, 40, 40, 13_824, 32_000, 4096)),
    )
}
