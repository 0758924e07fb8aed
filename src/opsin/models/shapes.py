"""Sizes of LLaVA-like pairs, for predictions without a file; `tools/synth` writes files of them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A CLIP-like vision transformer, in pixels, widths and counts."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    feed_forward: int

    @property
    def patches(self) -> int:
        """Patches of one image of `image_size`, which are its tokens."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class TextShape:
    """A language model, in widths and counts; `context` is in tokens."""

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
    """A vision encoder and a language model, joined by a projector of two layers."""

    name: str
    vision: VisionShape
    text: TextShape


_FILE = Path(__file__).with_name("shapes.toml")
SHAPES = {
    name: PairShape(name, VisionShape(**row["vision"]), TextShape(**row["text"]))
    for name, row in tomllib.loads(_FILE.read_text(encoding="utf-8")).items()
}
