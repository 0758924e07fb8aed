"""Is the installed llama-cpp-python the very one this code was written for?

Its ctypes mirror changes between patch releases, and a struct that lost or gained a field is not an error but a
crash later. So four things are compared before the first use: the versions, the symbols, known defaults near the end
of each parameter struct (a shifted field shows there), and a tensor of known shape read through our own mirror.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

from opsin.core.errors import NativeMismatch
from opsin.native.ggml import OBJECT_SIZE, InitParams, Tensor

VERSION = "0.3.36"
LIBRARY = "0.5.0-dev"  # what the llama.cpp inside it calls itself
MEND = f"run: pip install --force-reinstall llama-cpp-python=={VERSION}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LLAMA_SYMBOLS = _words(
    "llama_version llama_backend_init llama_log_set llama_model_default_params llama_model_load_from_file "
    "llama_model_free llama_model_get_vocab llama_model_rope_type llama_model_n_ctx_train llama_model_n_embd_inp "
    "llama_model_n_layer llama_model_n_head llama_model_n_head_kv llama_model_n_embd llama_model_meta_count "
    "llama_model_meta_key_by_index llama_model_meta_val_str_by_index llama_model_chat_template llama_model_ftype "
    "llama_ftype_name llama_model_n_params llama_model_is_recurrent llama_model_is_hybrid llama_model_has_encoder "
    "llama_context_default_params llama_init_from_model llama_free llama_get_memory llama_n_ctx llama_n_batch "
    "llama_n_ubatch llama_n_seq_max llama_decode llama_synchronize llama_set_causal_attn llama_get_logits_ith "
    "llama_memory_seq_rm llama_memory_seq_cp llama_memory_seq_pos_max llama_state_seq_get_size "
    "llama_state_seq_get_data llama_state_seq_set_data llama_vocab_n_tokens llama_vocab_get_attr "
    "llama_vocab_get_text llama_vocab_is_eog llama_vocab_bos llama_vocab_eos llama_vocab_get_add_bos "
    "llama_tokenize llama_token_to_piece llama_sampler_chain_default_params llama_sampler_chain_init "
    "llama_sampler_chain_add llama_sampler_free llama_sampler_sample llama_sampler_accept "
    "llama_sampler_init_greedy llama_sampler_init_dist llama_sampler_init_top_k llama_sampler_init_top_p "
    "llama_sampler_init_min_p llama_sampler_init_temp llama_sampler_init_penalties llama_sampler_init_logit_bias "
    "llama_model_n_swa"
)
MTMD_SYMBOLS = _words(
    "mtmd_context_params_default mtmd_init_from_file mtmd_free mtmd_support_vision mtmd_decode_use_mrope "
    "mtmd_decode_use_non_causal mtmd_bitmap_init mtmd_bitmap_free mtmd_bitmap_set_id mtmd_tokenize_from_parts "
    "mtmd_input_chunks_init mtmd_input_chunks_size mtmd_input_chunks_get mtmd_input_chunks_free "
    "mtmd_input_chunk_get_type mtmd_input_chunk_get_tokens_text mtmd_input_chunk_get_tokens_image "
    "mtmd_input_chunk_get_n_tokens mtmd_input_chunk_get_n_pos mtmd_input_chunk_get_id mtmd_input_chunk_save "
    "mtmd_helper_image_get_decoder_pos mtmd_encode_chunk mtmd_get_output_embd mtmd_batch_init mtmd_batch_free "
    "mtmd_batch_add_chunk mtmd_batch_encode mtmd_batch_get_output_embd mtmd_log_set mtmd_helper_log_set"
)

# The last fields of each struct, and one in the middle: any insertion or removal moves at least one of them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_params": {
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": 1,
        "use_extra_bufts": True,
        "no_host": False,
        "no_alloc": False,
        "load_mtp": False,
    },
    "llama_context_params": {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_outputs_max_per_seq": 1,
        "n_threads_batch": 4,
        "yarn_beta_slow": -1.0,
        "defrag_thold": -1.0,
        "type_k": 1,
        "type_v": 1,
        "offload_kqv": True,
        "op_offload": True,
        "swa_full": True,
        "kv_unified": False,
        "n_samplers": 0,
        "ctx_other": None,
    },
    "llama_sampler_chain_params": {"no_perf": True},
    "mtmd_context_params": {
        "use_gpu": True,
        "n_threads": 4,
        "media_marker": b"<__media__>",
        "flash_attn_type": -1,
        "image_max_tokens": -1,
        "batch_max_tokens": 1024,
        "progress_callback_user_data": None,
    },
}

# What our mirror of ggml_tensor must read from a product of f16 [64, 5, 7, 1] and f16 [64, 3, 7, 1].
TENSOR: dict[str, Any] = {
    "size": ctypes.sizeof(Tensor),
    "op": "MUL_MAT",
    "shape": (5, 3, 7, 1),
    "left": (1, (64, 5, 7, 1), (2, 128, 640, 4480), b"opsin"),
    "sources": True,
}


@dataclass(frozen=True, slots=True)
class Observed:
    """What was found: `expected()` is the one value that passes."""

    version: str
    library: str = ""
    missing: tuple[str, ...] = ()
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensor: dict[str, Any] = field(default_factory=dict)


def expected() -> Observed:
    """The observation of the pinned version."""
    return Observed(VERSION, LIBRARY, (), {name: dict(fields) for name, fields in DEFAULTS.items()}, dict(TENSOR))


def observe(version: str, llama: Any, mtmd: Any, ggml: Any, missing: list[str]) -> Observed:
    """Look at the libraries without using anything that depends on the answer."""
    missing = [
        *missing,
        *(name for name in LLAMA_SYMBOLS if not hasattr(llama, name)),
        *(name for name in MTMD_SYMBOLS if not hasattr(mtmd, name)),
    ]
    if version != VERSION or missing:
        return Observed(version, LIBRARY, tuple(missing))
    structs = {
        "llama_model_params": llama.llama_model_default_params(),
        "llama_context_params": llama.llama_context_default_params(),
        "llama_sampler_chain_params": llama.llama_sampler_chain_default_params(),
        "mtmd_context_params": mtmd.mtmd_context_params_default(),
    }
    defaults = {
        name: {wanted: getattr(structs[name], wanted, "no such field") for wanted in fields}
        for name, fields in DEFAULTS.items()
    }
    return Observed(version, llama.llama_version().decode(), (), defaults, _observe_tensor(ggml))


def _observe_tensor(ggml: Any) -> dict[str, Any]:
    size = ggml.ggml_tensor_overhead() - OBJECT_SIZE
    if size != TENSOR["size"]:
        return {"size": size}
    context = ggml.ggml_init(InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    try:
        left = ggml.ggml_new_tensor_4d(context, 1, 64, 5, 7, 1)
        right = ggml.ggml_new_tensor_4d(context, 1, 64, 3, 7, 1)
        ggml.ggml_set_name(left, b"opsin")
        product = Tensor.from_address(ggml.ggml_mul_mat(context, left, right))
        mirror = Tensor.from_address(left)
        return {
            "size": size,
            "op": ggml.ggml_op_name(product.op).decode(),
            "shape": tuple(product.ne),
            "left": (mirror.type, tuple(mirror.ne), tuple(mirror.nb), mirror.name),
            "sources": (product.src[0], product.src[1], product.src[2]) == (left, right, None),
        }
    finally:
        ggml.ggml_free(context)


def verify(found: Observed) -> None:
    """Raises NativeMismatch with one sentence when anything differs from `expected()`."""
    wanted = expected()
    if found.version != wanted.version:
        raise NativeMismatch(
            f"llama-cpp-python {found.version} is installed, but Opsin was built for exactly {VERSION}: {MEND}."
        )
    if found.missing:
        shown = ", ".join(found.missing[:3]) + (" and others" if len(found.missing) > 3 else "")
        raise NativeMismatch(f"The installed llama.cpp library lacks {shown}, which Opsin needs: {MEND}.")
    if found.library != wanted.library:
        raise NativeMismatch(
            f"The llama.cpp library that was loaded calls itself {found.library}, not {LIBRARY} "
            f"(is LLAMA_CPP_LIB_PATH set?): {MEND}."
        )
    for struct, fields in wanted.defaults.items():
        for name, value in fields.items():
            seen = found.defaults.get(struct, {}).get(name, "no such field")
            if seen != value:
                raise NativeMismatch(
                    f"The native struct {struct} is not laid out as Opsin expects ({name} is {seen!r}, not "
                    f"{value!r}): {MEND}."
                )
    for name, value in wanted.tensor.items():
        if found.tensor.get(name) != value:
            raise NativeMismatch(
                f"The native struct ggml_tensor is not laid out as Opsin expects ({name} is "
                f"{found.tensor.get(name)!r}, not {value!r}): {MEND}."
            )
