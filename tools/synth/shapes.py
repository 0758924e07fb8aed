"""All shapes that can be written: those of the package, and those of `families.toml`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from opsin.models import shapes as package
from synth.families import FAMILIES, ROWS, Family

WeightType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


@dataclass(frozen=True, slots=True)
class Sam:
    """The encoder of DeepSeek-OCR in front of its vision transformer, as wide at its end as that is."""

    width: int
    layers: int
    heads: int
    window: int


@dataclass(frozen=True, slots=True)
class VisionShape(package.VisionShape):
    """With how `merge` × `merge` patches become one image token.

    A large image is resized to one of `grids` (pixels) and cut into tiles of `image_size`; without grids it is one.
    `positions` are rows of the position table (0: the patches of `image_size`), `queries` the tokens of a resampler,
    `pixels` the least and the most of an image, `longest_edge` that of an image before it is cut. Behind the layers
    `deepstack` values are taken aside. Every `window_pattern`th layer attends to everything (0: all do).
    """

    merge: int = 1
    grids: tuple[tuple[int, int], ...] = ()
    positions: int = 0
    queries: int = 0
    pixels: tuple[int, ...] = ()
    longest_edge: int = 0
    deepstack: tuple[int, ...] = ()
    window_pattern: int = 0
    sam: Sam | None = None


@dataclass(frozen=True, slots=True)
class TextShape(package.TextShape):
    """With the pairs of a head's values that rotate by time, height, width and one more (M-RoPE), as `sections`.

    `window` is in tokens; every `pattern`th layer has none (0: no layer has one).
    """

    sections: tuple[int, ...] = ()
    window: int = 0
    pattern: int = 2

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.head_width or self.width // self.heads


@dataclass(frozen=True, slots=True)
class PairShape:
    """A vision encoder, a projector and a language model, joined as `family` (in `families.toml`) joins them.

    `contrast` widens the random weights behind attention scores and logits: at 1 a wrong position would hardly show.
    """

    name: str
    vision: VisionShape
    text: TextShape
    family: str = "llava"
    contrast: float = 1.0

    @property
    def kind(self) -> Family:
        """What its files have in common with others of the family."""
        return FAMILIES[self.family]


_PACKAGE = {
    name: PairShape(name, VisionShape(**asdict(shape.vision)), TextShape(**asdict(shape.text)))
    for name, shape in package.KNOWN_SHAPES.items()
}


def _shape(name: str, row: dict[str, Any]) -> PairShape:
    base, vision = _PACKAGE.get(name, _PACKAGE["tiny"]), _with_tuples(row.get("vision", {}))
    if sam := vision.get("sam"):
        vision["sam"] = Sam(**sam)
    text = replace(base.text, **_with_tuples(row.get("text", {})))
    return PairShape(name, replace(base.vision, **vision), text, row["family"], row.get("contrast", 1.0))


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


SHAPES: dict[str, PairShape] = {
    **{name: _PACKAGE[name] for name in package.SHAPES},
    **{name: _shape(name, row) for name, row in ROWS["shapes"].items()},
}
