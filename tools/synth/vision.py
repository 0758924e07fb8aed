"""Metadata keys and tensors of the projector files.

Sources: llama.cpp's `tools/mtmd/clip.cpp`, `clip-impl.h` and `models/*.cpp`. A family's `vision` names parts of its
encoder:

- `class`: a token of its own beside the patches'
- `frames`: one kernel for each of two frames; a still image goes through both
- `positions`: a table that is added to the patches
- `patch_bias`, `patch_norm`: patches have a bias, and are normalised
- `pre_norm`, `post_norm`: normalised in front of the layers, and behind them
- `rms`: normalised by their root mean square, without a bias; else by mean and deviation
- `gate`: feed-forward layers have a gate
- `fused_qkv`: queries, keys and values come from one tensor
- `no_bias`: the layers' matrices have no bias
- `head_norms`, `post_norms`: as in the language model
- `layer_scales`: factors for what attention and feed-forward put out
- `sam`: another encoder makes the patches (`synth/sam.py`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synth.projectors import projector_tensors
from synth.sam import sam_tensors
from synth.weights import FILE_TYPES, Tensor, linear, norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import PairShape, WeightType

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_MERGE_SIZE = frozenset({"qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "glm4v"})  # have another key for it
_MINICPMV = 3  # version 2.6


def clip_metadata(writer: Any, shape: PairShape, kind: WeightType) -> None:
    """Write the keys of the projector's file with a `gguf.GGUFWriter`."""
    vision, family = shape.vision, shape.kind
    writer.add_name(f"Random {shape.name} projector")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(family.projector)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.width)
    writer.add_vision_feed_forward_length(vision.feed_forward)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_projection_dim(shape.text.width)
    writer.add_vision_image_mean(_CLIP_MEAN if family.mean is None else [family.mean] * 3)
    writer.add_vision_image_std(_CLIP_STD if family.std is None else [family.std] * 3)
    writer.add_vision_use_gelu(family.activation == "gelu")
    writer.add_vision_use_silu(family.activation == "silu")
    if family.projector in _MERGE_SIZE:
        writer.add_vision_spatial_merge_size(vision.merge)
    elif vision.merge > 1:
        writer.add_vision_projector_scale_factor(vision.merge)
    if vision.grids:
        # The writer has no methods for these two.
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_array("clip.vision.image_grid_pinpoints", [edge for grid in vision.grids for edge in grid])
    if vision.longest_edge:
        writer.add_vision_preproc_image_size(vision.longest_edge)
    if vision.pixels:
        writer.add_vision_min_pixels(vision.pixels[0])
        writer.add_vision_max_pixels(vision.pixels[1])
    if vision.window_pattern:
        writer.add_vision_n_wa_pattern(vision.window_pattern)
    if vision.queries:
        writer.add_int32("clip.minicpmv_version", _MINICPMV)
        writer.add_uint32("clip.minicpmv_query_num", vision.queries)
    if sam := vision.sam:
        writer.add_vision_sam_layers_count(sam.layers)
        writer.add_vision_sam_embedding_length(sam.width)
        writer.add_vision_sam_head_count(sam.heads)
        writer.add_vision_window_size(sam.window)


def clip_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of the vision transformer and the projector, in the file's order."""
    vision, has = shape.vision, shape.kind.vision
    width, rms = vision.width, "rms" in has
    if vision.sam is not None:
        yield from sam_tensors(vision.sam, width, vision.image_size // vision.patch_size, kind)
    yield from _patches(shape, kind)
    if "pre_norm" in has:
        yield from norm("v.pre_ln", width, bias=not rms)
    if "post_norm" in has:
        yield from norm("v.post_ln", width, bias=not rms)
    for layer in range(vision.layers):
        yield from _layer(f"v.blk.{layer}.", shape, kind)
    yield from projector_tensors(shape, kind)


def _patches(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    vision, has = shape.vision, shape.kind.vision
    width, patch = vision.width, vision.patch_size
    full: WeightType = "f32" if kind == "f32" else "f16"  # of tensors that are never quantised
    spread = (3 * patch * patch) ** -0.5
    if "class" in has:
        yield Tensor("v.class_embd", (width,), "f32", 1.0)
    if "sam" not in has:
        yield Tensor("v.patch_embd.weight", (patch, patch, 3, width), full, spread)
    if "frames" in has:
        yield Tensor("v.patch_embd.weight.1", (patch, patch, 3, width), full, spread)
    if "patch_bias" in has:
        yield Tensor("v.patch_embd.bias", (width,), "f32", 0.02)
    if "patch_norm" in has:
        yield from norm("v.norm_embd", width)
    if "positions" in has:
        positions = (vision.positions or vision.patches) + ("class" in has)
        # Gemma 4 looks up in one table for columns and one for rows; others may resize theirs, which takes f32.
        by_axis = shape.kind.projector == "gemma4v"
        size = (width, positions, 2) if by_axis else (width, positions)
        yield Tensor("v.position_embd.weight", size, full if by_axis else "f32", 0.5)


def _layer(block: str, shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    vision, has = shape.vision, shape.kind.vision
    width, forward, bias, rms = vision.width, vision.feed_forward, "no_bias" not in has, "rms" in has
    yield from norm(block + "ln1", width, bias=not rms)
    if "fused_qkv" in has:
        yield from linear(kind, block + "attn_qkv", width, 3 * width, bias=bias)
    else:
        for name in ("attn_q", "attn_k", "attn_v"):
            yield from linear(kind, block + name, width, width, bias=bias)
    yield from linear(kind, block + "attn_out", width, width, bias=bias)
    if "head_norms" in has:  # their product is not divided by anything
        head = width // vision.heads
        yield from norm(block + "attn_q_norm", head, head**-0.25)
        yield from norm(block + "attn_k_norm", head, head**-0.25)
    if "post_norms" in has:
        yield from norm(block + "attn_post_norm", width)
        yield from norm(block + "ffn_post_norm", width)
    if "layer_scales" in has:
        yield from norm(block + "ls1", width)
        yield from norm(block + "ls2", width)
    yield from norm(block + "ln2", width, bias=not rms)
    if "gate" in has:
        yield from linear(kind, block + "ffn_gate", width, forward, bias=bias)
    yield from linear(kind, block + "ffn_up", width, forward, bias=bias)
    yield from linear(kind, block + "ffn_down", forward, width, bias=bias)
