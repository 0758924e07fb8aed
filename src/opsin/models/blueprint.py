"""What the two files of a random-weight pair hold: metadata keys and tensors, as llama.cpp's loaders ask for them.

Sources: `src/models/llama.cpp` and `src/llama-vocab.cpp` for the language model; `tools/mtmd/clip.cpp`,
`clip-impl.h` and `models/llava.cpp` for the projector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsin.models.vocabulary import make_vocabulary
from opsin.models.weights import Tensor, WeightType, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opsin.models.shapes import PairShape

# llama.cpp's `llama_ftype`
_FILE_TYPES: dict[WeightType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}

# CLIP's normalisation, per colour
_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]

# Vicuna's turns, for content that is a string or a list of parts.
TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {% elif message.role == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llm_metadata(writer: Any, shape: PairShape, kind: WeightType, *, template: bool) -> None:
    """Keys of the language model's file, into a `gguf.GGUFWriter`."""
    text = shape.text
    writer.add_name(f"Random {shape.name}")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_context_length(text.context)
    writer.add_embedding_length(text.width)
    writer.add_block_count(text.layers)
    writer.add_feed_forward_length(text.feed_forward)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_rope_dimension_count(text.width // text.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(text.vocabulary)
    vocabulary = make_vocabulary(text.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if template:
        writer.add_chat_template(TEMPLATE)


def llm_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of a `llama` model, in the file's order."""
    text = shape.text
    width, forward = text.width, text.feed_forward

    def linear(name: str, inputs: int, outputs: int) -> Tensor:
        return Tensor(f"{name}.weight", (inputs, outputs), fits(kind, inputs), inputs**-0.5)

    def norm(name: str) -> Tensor:
        return Tensor(f"{name}.weight", (width,), "f32", 0.0, mean=1.0)

    # Rows of unit spread, as wide as what the projector hands over for pictures.
    yield Tensor("token_embd.weight", (width, text.vocabulary), fits(kind, width), 1.0)
    for layer in range(text.layers):
        block = f"blk.{layer}."
        yield norm(block + "attn_norm")
        yield linear(block + "attn_q", width, width)
        yield linear(block + "attn_k", width, text.kv_width)
        yield linear(block + "attn_v", width, text.kv_width)
        yield linear(block + "attn_output", width, width)
        yield norm(block + "ffn_norm")
        yield linear(block + "ffn_gate", width, forward)
        yield linear(block + "ffn_up", width, forward)
        yield linear(block + "ffn_down", forward, width)
    yield norm("output_norm")
    yield linear("output", width, text.vocabulary)


def clip_metadata(writer: Any, shape: PairShape, kind: WeightType) -> None:
    """Keys of the projector's file, into a `gguf.GGUFWriter`."""
    vision = shape.vision
    writer.add_name(f"Random {shape.name} projector")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.width)
    writer.add_vision_feed_forward_length(vision.feed_forward)
    writer.add_vision_block_count(vision.layers)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_projection_dim(shape.text.width)
    writer.add_vision_image_mean(_IMAGE_MEAN)
    writer.add_vision_image_std(_IMAGE_STD)
    writer.add_vision_use_gelu(False)


def clip_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of a CLIP vision transformer with LLaVA's two-layer projector, in the file's order."""
    vision = shape.vision
    width, forward = vision.width, vision.feed_forward
    full: WeightType = "f32" if kind == "f32" else "f16"  # the convolution's kernel is never quantised

    def linear(name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (inputs, outputs), fits(kind, inputs), inputs**-0.5)
        yield Tensor(f"{name}.bias", (outputs,), "f32", 0.02)

    def norm(name: str) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (width,), "f32", 0.0, mean=1.0)
        yield Tensor(f"{name}.bias", (width,), "f32", 0.0)

    patch = vision.patch_size
    yield Tensor("v.class_embd", (width,), "f32", 1.0)
    yield Tensor("v.patch_embd.weight", (patch, patch, 3, width), full, (3 * patch * patch) ** -0.5)
    yield Tensor("v.position_embd.weight", (width, vision.patches + 1), "f32", 0.5)
    yield from norm("v.pre_ln")
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
    yield from linear("mm.0", width, shape.text.width)
    yield from linear("mm.2", shape.text.width, shape.text.width)
