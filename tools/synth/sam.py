"""Tensors of the encoder that looks at an image before DeepSeek-OCR's vision transformer does.

Source: llama.cpp's `tools/mtmd/models/deepseekocr.cpp`, which computes it in f32 wherever it resizes a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from synth.weights import Tensor, linear, norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import Sam, WeightType

_EVERYWHERE = frozenset({2, 5, 8, 11})  # layers that attend to the whole image, not to a window
_PATCH = 16


def sam_tensors(sam: Sam, out: int, side: int, kind: WeightType) -> Iterator[Tensor]:
    """Its tensors, in the file's order; `side` patches make an image's edge, and `out` is the width at its end."""
    width, head = sam.width, sam.width // sam.heads
    full: WeightType = "f32" if kind == "f32" else "f16"
    yield Tensor("v.sam.pos_embd.weight", (width, side, side), "f32", 0.5)
    yield Tensor("v.sam.patch_embd.weight", (_PATCH, _PATCH, 3, width), full, (3 * _PATCH * _PATCH) ** -0.5)
    yield Tensor("v.sam.patch_embd.bias", (width,), "f32", 0.02)
    for layer in range(sam.layers):
        block = f"v.sam.blk.{layer}."
        seen = side if layer in _EVERYWHERE else sam.window
        yield from norm(block + "pre_ln", width, bias=True)
        yield from linear(kind, block + "attn.qkv", width, 3 * width, bias=True)
        yield from linear(kind, block + "attn.out", width, width, bias=True)
        yield Tensor(block + "attn.pos_h.weight", (head, 2 * seen - 1), "f32", 0.1)
        yield Tensor(block + "attn.pos_w.weight", (head, 2 * seen - 1), "f32", 0.1)
        yield from norm(block + "post_ln", width, bias=True)
        yield from linear(kind, block + "mlp.lin1", width, 2 * width, bias=True)
        yield from linear(kind, block + "mlp.lin2", 2 * width, width, bias=True)
    neck = out // 4
    yield from _convolution("v.sam.neck.0", 1, width, neck, full)
    yield from norm("v.sam.neck.1", neck, bias=True)
    yield from _convolution("v.sam.neck.2", 3, neck, neck, full)
    yield from norm("v.sam.neck.3", neck, bias=True)
    yield from _convolution("v.sam.net_2", 3, neck, 2 * neck, full)
    yield from _convolution("v.sam.net_3", 3, 2 * neck, out, full)


def _convolution(name: str, edge: int, inputs: int, outputs: int, kind: WeightType) -> Iterator[Tensor]:
    spread = (edge * edge * inputs) ** -0.5
    yield Tensor(f"{name}.weight", (edge, edge, inputs, outputs), kind, spread)
