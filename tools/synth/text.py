"""Metadata keys and tensors of the language models.

Sources: llama.cpp's `src/models/*.cpp`, by architecture, `src/llama-arch.cpp` and `src/llama-vocab.cpp`. A family's
`text` names what its architecture has besides Llama's layers:

- `qkv_bias`: queries, keys and values have a bias
- `head_norms`: queries and keys are normalised, head by head
- `post_norms`: what attention and feed-forward put out is normalised, too
- `scaled_tokens`: the embeddings of tokens are multiplied by the root of the width, those of images are not
- `fused_gate`: gate and up are one tensor
- `experts`: all layers but the first choose among experts
- `latent`: keys and values are kept as one short vector for all heads (MLA)
- `short_convolutions`: every other layer has a convolution over some tokens in place of attention
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from synth.vocabulary import make_bpe_vocabulary, make_vocabulary
from synth.weights import FILE_TYPES, Tensor, fits, linear, norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from synth.shapes import PairShape, TextShape, WeightType

_EXPERTS, _EXPERTS_USED = 4, 2
# MLA: of queries, and of keys and values, in short; of a head's part without and with a position; of its values.
_Q_RANK, _KV_RANK, _NOPE, _ROPE, _VALUE = 32, 32, 32, 16, 32
_KERNEL = 3  # tokens that a short convolution sees
_SIGMOID = 2  # llama.cpp's `llama_expert_gating_func_type`


def llm_metadata(writer: Any, shape: PairShape, kind: WeightType, *, template: bool) -> None:
    """Write the keys of the language model's file with a `gguf.GGUFWriter`."""
    text, has = shape.text, shape.kind.text
    writer.add_name(f"Random {shape.name}")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_context_length(text.context)
    writer.add_embedding_length(text.width)
    writer.add_block_count(text.layers)
    writer.add_feed_forward_length(text.feed_forward)
    writer.add_head_count(text.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(text.vocabulary)
    if text.sections:
        writer.add_rope_dimension_sections(list(text.sections))
    if "latent" in has:
        _add_latent(writer)
    else:
        writer.add_rope_dimension_count(text.head)
        kv_heads = [0 if _convolves(shape, layer) else text.kv_heads for layer in range(text.layers)]
        writer.add_head_count_kv(kv_heads if "short_convolutions" in has else text.kv_heads)
    if text.window:
        _add_window(writer, shape)
    if "experts" in has:
        writer.add_leading_dense_block_count(1)
        writer.add_expert_count(_EXPERTS)
        writer.add_expert_used_count(_EXPERTS_USED)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(text.feed_forward // 2)
        if "latent" in has:
            writer.add_uint32(f"{shape.kind.architecture}.expert_gating_func", _SIGMOID)
    if "short_convolutions" in has:
        writer.add_shortconv_l_cache(_KERNEL)
    if shape.vision.deepstack:
        writer.add_num_deepstack_layers(len(shape.vision.deepstack))
    _add_vocabulary(writer, shape)
    if template:
        writer.add_chat_template(shape.kind.template)


def _convolves(shape: PairShape, layer: int) -> bool:
    return "short_convolutions" in shape.kind.text and layer % 2 == 0


def _add_latent(writer: Any) -> None:
    """For llama.cpp all heads share one key of rank and position, as it multiplies the rest into the queries."""
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(_ROPE)
    writer.add_q_lora_rank(_Q_RANK)
    writer.add_kv_lora_rank(_KV_RANK)
    writer.add_key_length(_KV_RANK + _ROPE)
    writer.add_value_length(_KV_RANK)
    writer.add_key_length_mla(_NOPE + _ROPE)
    writer.add_value_length_mla(_VALUE)


def _add_window(writer: Any, shape: PairShape) -> None:
    text = shape.text
    writer.add_key_length(text.head)
    writer.add_value_length(text.head)
    writer.add_sliding_window(text.window)
    if shape.kind.architecture != "gemma4":
        writer.add_sliding_window_pattern(text.pattern)
        return
    writer.add_sliding_window_pattern([not _sees_everything(text, layer) for layer in range(text.layers)])
    writer.add_key_length_swa(text.head)
    writer.add_value_length_swa(text.head)
    writer.add_embedding_length_per_layer_input(0)


def _sees_everything(text: TextShape, layer: int) -> bool:
    return not text.window or layer % text.pattern == text.pattern - 1


def _add_vocabulary(writer: Any, shape: PairShape) -> None:
    family, size = shape.kind, shape.text.vocabulary
    if family.pre:
        vocabulary = make_bpe_vocabulary(size, family.control)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(family.pre)
        writer.add_token_merges(vocabulary.merges)
        writer.add_bos_token_id(vocabulary.tokens.index(family.bos or family.control[0]))
        writer.add_eos_token_id(vocabulary.tokens.index(family.eos))
        writer.add_add_bos_token(bool(family.bos))
    else:
        vocabulary = make_vocabulary(size, family.control)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        if family.control:
            writer.add_add_space_prefix(False)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if family.eot:
        writer.add_eot_token_id(vocabulary.tokens.index(family.eot))


def llm_tensors(shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    """Tensors of the language model, in the file's order."""
    text, has, width = shape.text, shape.kind.text, shape.text.width
    # Rows of unit spread, like the image embeddings of the projector.
    spread = width**-0.5 if "scaled_tokens" in has else 1.0
    yield Tensor("token_embd.weight", (width, text.vocabulary), fits(kind, width), spread)
    if shape.kind.architecture == "gemma4":
        yield Tensor("rope_freqs.weight", (text.head // 2,), "f32", 0.0, mean=1.0)
    for layer in range(text.layers):
        block = f"blk.{layer}."
        yield from norm(block + "attn_norm", width)
        if _convolves(shape, layer):
            yield from _convolution(block, width, kind)
        elif "latent" in has:
            yield from _latent_attention(block, shape, kind)
        else:
            yield from _attention(block, shape, kind)
        if "post_norms" in has:
            yield from norm(block + "post_attention_norm", width)
            yield from norm(block + "post_ffw_norm", width)
        yield from norm(block + "ffn_norm", width)
        yield from _feed_forward(block, shape, kind, experts="experts" in has and layer > 0)
    yield from norm("token_embd_norm" if "short_convolutions" in has else "output_norm", width)
    if not text.tied:
        yield from linear(kind, "output", width, text.vocabulary, shape.contrast)


def _attention(block: str, shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    text, has, contrast = shape.text, shape.kind.text, shape.contrast
    width, queries, bias = text.width, text.head * text.heads, "qkv_bias" in has
    yield from linear(kind, block + "attn_q", width, queries, contrast, bias=bias)
    yield from linear(kind, block + "attn_k", width, text.kv_width, contrast, bias=bias)
    yield from linear(kind, block + "attn_v", width, text.kv_width, bias=bias)
    yield from linear(kind, block + "attn_output", queries, width)
    if "head_norms" in has:
        # Queries and keys are normalised, so the contrast goes into these norms. Gemma 4 does not divide their product.
        gain = contrast * (text.head**-0.25 if shape.kind.architecture == "gemma4" else 1.0)
        yield from norm(block + "attn_q_norm", text.head, gain)
        yield from norm(block + "attn_k_norm", text.head, gain)


def _latent_attention(block: str, shape: PairShape, kind: WeightType) -> Iterator[Tensor]:
    width, heads = shape.text.width, shape.text.heads
    yield from linear(kind, block + "attn_q_a", width, _Q_RANK)
    yield from norm(block + "attn_q_a_norm", _Q_RANK)
    yield from linear(kind, block + "attn_q_b", _Q_RANK, heads * (_NOPE + _ROPE), shape.contrast)
    yield from linear(kind, block + "attn_kv_a_mqa", width, _KV_RANK + _ROPE, shape.contrast)
    yield from norm(block + "attn_kv_a_norm", _KV_RANK)
    yield Tensor(block + "attn_k_b.weight", (_NOPE, _KV_RANK, heads), fits(kind, _NOPE), _NOPE**-0.5)
    yield Tensor(block + "attn_v_b.weight", (_KV_RANK, _VALUE, heads), fits(kind, _KV_RANK), _KV_RANK**-0.5)
    yield from linear(kind, block + "attn_output", heads * _VALUE, width)


def _convolution(block: str, width: int, kind: WeightType) -> Iterator[Tensor]:
    yield Tensor(block + "shortconv.conv.weight", (_KERNEL, width), "f32", _KERNEL**-0.5)
    yield from linear(kind, block + "shortconv.in_proj", width, 3 * width)
    yield from linear(kind, block + "shortconv.out_proj", width, width)


def _feed_forward(block: str, shape: PairShape, kind: WeightType, *, experts: bool) -> Iterator[Tensor]:
    width, forward = shape.text.width, shape.text.feed_forward
    if not experts:
        if "fused_gate" in shape.kind.text:
            yield from linear(kind, block + "ffn_up", width, 2 * forward)
        else:
            yield from linear(kind, block + "ffn_gate", width, forward)
            yield from linear(kind, block + "ffn_up", width, forward)
        yield from linear(kind, block + "ffn_down", forward, width)
        return
    forward //= 2
    # Far apart, as two experts that are nearly as good would be another choice with another rounding.
    yield Tensor(block + "ffn_gate_inp.weight", (width, _EXPERTS), "f32", 8 * width**-0.5)
    if "latent" in shape.kind.text:
        yield Tensor(block + "exp_probs_b.bias", (_EXPERTS,), "f32", 1.0)
    for name, inputs, outputs in (("gate", width, forward), ("up", width, forward), ("down", forward, width)):
        spread, stored = inputs**-0.5, fits(kind, inputs)
        yield Tensor(f"{block}ffn_{name}_exps.weight", (inputs, outputs, _EXPERTS), stored, spread)
        yield Tensor(f"{block}ffn_{name}_shexp.weight", (inputs, outputs), stored, spread)
