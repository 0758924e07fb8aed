"""Metadata keys and tensors of the projector files: `mlp` (LLaVA), `qwen2vl_merger` and `gemma3`.

Sources: llama.cpp's `tools/mtmd/clip.cpp`, `clip-impl.h` and `models/llava.cpp`, `qwen2vl.cpp`, `siglip.cpp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synth.weights import FILE_TYPES, Tensor, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import Family, PairShape, WeightType

_PROJECTORS: dict[Family, str] = {"llava": "mlp", "qwen2vl": "qwen2vl_merger", "gemma3": "gemma3"}

# Normalisation per colour channel: CLIP's; SigLIP, Gemma's encoder, takes values from -1 to 1.
_MEAN: dict[Family, list[float]] = {"gemma3": [0.5, 0.5, 0.5]}
_STD: dict[Family, list[float]] = {"gemma3": [0.5, 0.5, 0.5]}
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def clip_metadata(writer: Any, shape: PairShape, kind: WeightType) -> None:
    """Write the keys of the projector's file with a `gguf.GGUFWriter`."""
    vision, family = shape.vision, shape.family
    writer.add_name(f"Random {shape.name} projector")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(_PROJECTORS[family])
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.width)
    writer.add_vision_feed_forward_length(vision.feed_forward)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_projection_dim(shape.text.width)
    writer.add_vision_image_mean(_MEAN.get(family, _CLIP_MEAN))
    writer.add_vision_image_std(_STD.get(family, _CLIP_STD))
    writer.add_vision_use_gelu(family == "gemma3")
    if family == "gemma3":
        writer.add_vision_projector_scale_factor(vision.merge)
    elif vision.merge > 1:
        writer.add_vision_spatial_merge_size(vision.merge)
    if vision.grids:
        # The writer has no methods for these two.
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_array("clip.vision.image_grid_pinpoints", [edge for grid in vision.grids for edge in grid])


def clip_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of the vision transformer and the projector, in the file's order."""
    vision, family, out = shape.vision, shape.family, shape.text.width
    width, patch, forward = vision.width, vision.patch_size, vision.feed_forward
    full: WeightType = "f32" if kind == "f32" else "f16"  # of tensors that are never quantised

    def linear(name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (inputs, outputs), fits(kind, inputs), inputs**-0.5)
        yield Tensor(f"{name}.bias", (outputs,), "f32", 0.02)

    def norm(name: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (width,), "f32", 0.0, mean=1.0)
        yield Tensor(f"{name}.bias", (width,), "f32", 0.0)

    spread = (3 * patch * patch) ** -0.5
    if family == "llava":
        yield Tensor("v.class_embd", (width,), "f32", 1.0)
    yield Tensor("v.patch_embd.weight", (patch, patch, 3, width), full, spread)
    if family == "qwen2vl":  # one kernel for each of two frames; a still image goes through both
        yield Tensor("v.patch_embd.weight.1", (patch, patch, 3, width), full, spread)
    else:
        positions = vision.patches + (family == "llava")
        yield Tensor("v.position_embd.weight", (width, positions), "f32", 0.5)
    yield from norm("v.pre_ln" if family == "llava" else "v.post_ln")
    for layer in range(vision.layers):
        block = f"v.blk.{layer}."
        yield from norm(block + "ln1")
        yield from linear(block + "attn_q", width, width)
        yield from linear(block + "attn_k", width, width)
        yield from linear(block + "attn_v", width, width)
        yield from linear(block + "attn_out", width, width)
        yield from norm(block + "ln2")
        yield from linear(block + "ffn_up", width, forward)
        yield from linear(block + "ffn_down", forward, width)
    if family == "gemma3":
        yield Tensor("mm.soft_emb_norm.weight", (width,), "f32", 0.0, mean=1.0)
        # Stored transposed; llama.cpp transposes it at every encode.
        yield Tensor("mm.input_projection.weight", (out, width), full, width**-0.5)
        return
    merged = width * vision.merge**2
    hidden = merged if family == "qwen2vl" else out
    yield from linear("mm.0", merged, hidden)
    yield from linear("mm.2", hidden, out)
    if vision.grids:
        yield Tensor("v.image_newline", (out,), "f32", 1.0)
