"""Sizes of pairs, for predictions without a file: of the known models, and LLaVA-like ones for `tools/synth`."""

from collections.abc import Sequence
from dataclasses import dataclass

from opsin.core.files import read_table


@dataclass(frozen=True, slots=True)
class VisionShape:
    """A vision transformer, in pixels, widths and counts; `gated`: a feed-forward has three matrices.

    Without the other fields it is LLaVA's. An image of 640×480 pixels is cut into `tiles`, each of `tile_patches` (0:
    a square of `image_size`) and `tile_tokens` (0: one a patch). `projector` are the widths along its matrices, and
    `extra` the values of further matrices that each token goes through.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    gated: bool = False
    tiles: int = 1
    tile_patches: int = 0
    tile_tokens: int = 0
    projector: Sequence[int] = ()
    extra: int = 0

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return self.tile_patches or (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True)
class TextShape:
    """A language model, in widths and counts; `context` is in tokens. `tied`: its output layer is its embeddings.

    The layers after `dense_layers` have `experts`, of which a token uses some; both count those that all tokens share.
    `attention` are the values of a layer's attention where they do not follow from the widths.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context: int
    head_width: int = 0
    tied: bool = False
    dense_layers: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    attention: int = 0

    @property
    def kv_width(self) -> int:
        """Width of keys and of values."""
        return (self.head_width or self.width // self.heads) * self.kv_heads

    def weights(self, experts: int) -> int:
        """Values of all layers' matrices, with that many experts in each layer that has some."""
        dense = self.dense_layers if self.experts else self.layers
        forward = dense * self.feed_forward + (self.layers - dense) * experts * self.expert_feed_forward
        attention = self.attention or 2 * self.width * self.kv_width * (1 + self.heads // self.kv_heads)
        return self.layers * attention + 3 * self.width * forward


@dataclass(frozen=True, slots=True)
class PairShape:
    """A vision encoder and a language model, joined by a projector; `note` says what of it is an estimate."""

    name: str
    vision: VisionShape
    text: TextShape
    note: str = ""


KNOWN_SHAPES = {
    name: PairShape(
        name, VisionShape(**row["vision"], **row.get("image", {})), TextShape(**row["text"]), row.get("note", "")
    )
    for name, row in read_table(__file__, "shapes.toml").items()
}
SHAPES = {name: shape for name, shape in KNOWN_SHAPES.items() if not shape.vision.tile_tokens}
"""Those like LLaVA, of which `tools/synth` writes files."""
