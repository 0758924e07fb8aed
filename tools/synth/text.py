"""Metadata keys and tensors of the language models: `llama`, `qwen2vl` and `gemma3`.

Sources: llama.cpp's `src/models/llama.cpp`, `qwen2vl.cpp`, `gemma3.cpp` and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synth.templates import TEMPLATES
from synth.vocabulary import make_bpe_vocabulary, make_vocabulary
from synth.weights import FILE_TYPES, Tensor, fits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import PairShape, WeightType

# What mtmd puts around an image and what ends a conversation turn must be tokens of the vocabulary.
_QWEN_CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
)
_GEMMA_CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
_WINDOW_PATTERN = 2  # one layer in two attends to everything


def llm_metadata(writer: Any, shape: PairShape, kind: WeightType, *, template: bool) -> None:
    """Write the keys of the language model's file with a `gguf.GGUFWriter`."""
    text = shape.text
    writer.add_name(f"Random {shape.name}")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_context_length(text.context)
    writer.add_embedding_length(text.width)
    writer.add_block_count(text.layers)
    writer.add_feed_forward_length(text.feed_forward)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_rope_dimension_count(text.width // text.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(text.vocabulary)
    if text.sections is not None:
        writer.add_rope_dimension_sections(list(text.sections))
    if text.window:
        writer.add_key_length(text.width // text.heads)
        writer.add_value_length(text.width // text.heads)
        writer.add_sliding_window(text.window)
        writer.add_sliding_window_pattern(_WINDOW_PATTERN)
    if shape.family == "qwen2vl":
        _add_bpe(writer, text.vocabulary)
    else:
        _add_spm(writer, text.vocabulary, shape)
    if template:
        writer.add_chat_template(TEMPLATES[shape.family])


def _add_spm(writer: Any, size: int, shape: PairShape) -> None:
    gemma = shape.family == "gemma3"
    vocabulary = make_vocabulary(size, _GEMMA_CONTROL if gemma else ())
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
    if gemma:
        writer.add_eot_token_id(vocabulary.tokens.index("<end_of_turn>"))
        writer.add_add_space_prefix(False)


def _add_bpe(writer: Any, size: int) -> None:
    vocabulary = make_bpe_vocabulary(size, _QWEN_CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(vocabulary.tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def llm_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of the language model, in the file's order."""
    text, family = shape.text, shape.family
    width, forward = text.width, text.feed_forward

    def linear(name: str, inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = False) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (inputs, outputs), fits(kind, inputs), gain * inputs**-0.5)
        if bias:
            yield Tensor(f"{name}.bias", (outputs,), "f32", 0.02)

    def norm(name: str, size: int = width, mean: float = 1.0) -> Tensor:
        return Tensor(f"{name}.weight", (size,), "f32", 0.0, mean=mean)

    qkv_bias = family == "qwen2vl"
    # Rows of unit spread, like the image embeddings of the projector; Gemma multiplies them by the root of the width.
    yield Tensor(
        "token_embd.weight",
        (width, text.vocabulary),
        fits(kind, width),
        width**-0.5 if family == "gemma3" else 1.0,
    )
    for layer in range(text.layers):
        block = f"blk.{layer}."
        yield norm(block + "attn_norm")
        yield from linear(block + "attn_q", width, width, shape.contrast, bias=qkv_bias)
        yield from linear(block + "attn_k", width, text.kv_width, shape.contrast, bias=qkv_bias)
        yield from linear(block + "attn_v", width, text.kv_width, bias=qkv_bias)
        yield from linear(block + "attn_output", width, width)
        if family == "gemma3":
            # Queries and keys are normalised, so the contrast goes into these norms.
            yield norm(block + "attn_q_norm", width // text.heads, shape.contrast)
            yield norm(block + "attn_k_norm", width // text.heads, shape.contrast)
            yield norm(block + "post_attention_norm")
            yield norm(block + "post_ffw_norm")
        yield norm(block + "ffn_norm")
        yield from linear(block + "ffn_gate", width, forward)
        yield from linear(block + "ffn_up", width, forward)
        yield from linear(block + "ffn_down", forward, width)
    yield norm("output_norm")
    yield from linear("output", width, text.vocabulary, shape.contrast)
