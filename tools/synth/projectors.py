"""Tensors between the vision encoder and the language model, by the type of the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synth.weights import Tensor, fits, linear, norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import PairShape, WeightType


def projector_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """The projector's tensors, in the file's order."""
    match shape.kind.projector:
        case "gemma3" | "gemma4v":
            yield from _gemma(shape, kind)
        case "resampler":
            yield from _resampler(shape, kind)
        case "glm4v":
            yield from _glm4v(shape, kind)
        case "deepseekocr":
            yield from linear(kind, "mm.model.fc", 2 * shape.vision.width, shape.text.width, bias=True)
            yield Tensor("v.image_newline", (shape.text.width,), "f32", 1.0)
            yield Tensor("v.view_seperator", (shape.text.width,), "f32", 1.0)  # llama.cpp's spelling
        case "idefics3":
            yield from linear(kind, "mm.model.fc", _merged(shape), shape.text.width)
        case _:
            yield from _two_layers(shape, kind)


def _merged(shape: PairShape) -> int:
    """Values of the patches that become one token."""
    return shape.vision.width * shape.vision.merge**2


def _two_layers(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """What most have: two matrices, with a normalisation in front, extra rows, or extra values of earlier layers."""
    width, out, merged = shape.vision.width, shape.text.width, _merged(shape)
    projector, first, second, hidden = shape.kind.projector, "mm.1", "mm.2", out
    match projector:
        case "mlp":
            first = "mm.0"
        case "qwen2vl_merger" | "qwen2.5vl_merger" | "qwen3vl_merger":
            first, hidden = "mm.0", merged
        case "internvl":
            first, second = "mm.model.mlp.1", "mm.model.mlp.3"
            yield from norm("mm.model.mlp.0", merged, bias=True)
        case "kimivl" | "paddleocr":
            hidden = merged
            yield from norm("mm.input_norm", width, bias=True)
        case "lfm2":
            yield from norm("mm.input_norm", merged, bias=True)
    yield from linear(kind, first, merged, hidden, bias=True)
    yield from linear(kind, second, hidden, out, bias=True)
    if shape.vision.grids:
        yield Tensor("v.image_newline", (out,), "f32", 1.0)
    if projector == "pixtral":
        yield Tensor("v.token_embd.img_break", (out,), "f32", 1.0)
    for layer in shape.vision.deepstack:
        yield from norm(f"v.deepstack.{layer}.norm", merged, bias=True)
        yield from linear(kind, f"v.deepstack.{layer}.fc1", merged, merged, bias=True)
        yield from linear(kind, f"v.deepstack.{layer}.fc2", merged, out, bias=True)


def _gemma(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    width, out = shape.vision.width, shape.text.width
    if shape.kind.projector == "gemma4v":
        yield Tensor("mm.input_projection.weight", (width, out), fits(kind, width), width**-0.5)
        return
    yield from norm("mm.soft_emb_norm", width)
    # Stored transposed; llama.cpp transposes it at every encode.
    yield Tensor("mm.input_projection.weight", (out, width), "f32" if kind == "f32" else "f16", width**-0.5)


def _resampler(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """One attention of a fixed number of queries to all patches, in heads of 128."""
    width, out = shape.vision.width, shape.text.width
    yield Tensor("resampler.pos_embed_k", (out, shape.vision.positions), "f32", 0.0)  # must be there, and is not read
    yield Tensor("resampler.query", (out, shape.vision.queries), "f32", 1.0)
    yield from linear(kind, "resampler.proj", out, out)
    yield from linear(kind, "resampler.kv", width, out)
    for name in ("q", "k", "v", "out"):
        yield from linear(kind, f"resampler.attn.{name}", out, out, bias=True)
    for name in ("q", "kv", "post"):
        yield from norm(f"resampler.ln_{name}", out, bias=True)


def _glm4v(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    width, out, merge = shape.vision.width, shape.text.width, shape.vision.merge
    stored: WeightType = "f32" if kind == "f32" else "f16"
    yield Tensor("mm.patch_merger.weight", (merge, merge, width, out), stored, _merged(shape) ** -0.5)
    yield Tensor("mm.patch_merger.bias", (out,), "f32", 0.02)
    yield from linear(kind, "mm.model.fc", out, out)
    yield from norm("mm.post_norm", out, bias=True)
    for name, inputs, outputs in (("gate", out, 2 * out), ("up", out, 2 * out), ("down", 2 * out, out)):
        yield from linear(kind, f"mm.{name}", inputs, outputs)
