"""Is the installed llama-cpp-python the very one this code was written for?

Its ctypes mirror changes between patch releases, and a struct that lost or gained a field is not an error but a crash
later. Importing the bindings fails where the library lacks one of their functions; the rest is compared here.
"""

from __future__ import annotations

import ctypes
from typing import Any

from opsin.core.errors import NativeMismatch
from opsin.native.ggml import OBJECT_SIZE, InitParams, Tensor

VERSION = "0.3.36"
LIBRARY = "0.5.0-dev"  # what the llama.cpp inside it calls itself
MEND = f"run: pip install --force-reinstall llama-cpp-python=={VERSION}"

# Defaults in the middle and at the end of each struct: any field inserted or removed shifts at least one of them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_model_params": {"n_gpu_layers": -1, "split_mode": 1, "use_extra_bufts": True, "load_mtp": False},
    "llama_context_params": {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_threads_batch": 4,
        "yarn_beta_slow": -1.0,
        "type_v": 1,
        "op_offload": True,
        "swa_full": True,
        "ctx_other": None,
    },
    "llama_sampler_chain_params": {"no_perf": True},
    "mtmd_context_params": {
        "n_threads": 4,
        "media_marker": b"<__media__>",
        "flash_attn_type": -1,
        "image_max_tokens": -1,
        "batch_max_tokens": 1024,
        "progress_callback_user_data": None,
    },
}


def check(version: str, llama: Any, mtmd: Any, ggml: Any, missing: list[str]) -> None:
    """Compare the bindings, the library behind them and their structs with what this code was written for.

    `missing` are names of ggml functions that were not found. Raises NativeMismatch with the way to mend it.
    """
    if version != VERSION:
        raise NativeMismatch(
            f"llama-cpp-python {version} is installed, but Opsin was built for exactly {VERSION}: {MEND}."
        )
    if missing:
        raise NativeMismatch(f"The installed llama.cpp library lacks {missing[0]}, which Opsin needs: {MEND}.")
    library = llama.llama_version().decode()
    if library != LIBRARY:
        raise NativeMismatch(
            f"The llama.cpp library that was loaded calls itself {library}, not {LIBRARY} "
            f"(is LLAMA_CPP_LIB_PATH set?): {MEND}."
        )
    structs = {
        "llama_model_params": llama.llama_model_default_params(),
        "llama_context_params": llama.llama_context_default_params(),
        "llama_sampler_chain_params": llama.llama_sampler_chain_default_params(),
        "mtmd_context_params": mtmd.mtmd_context_params_default(),
    }
    wrong = [
        f"{struct} ({name} is {seen!r}, not {value!r})"
        for struct, fields in DEFAULTS.items()
        for name, value in fields.items()
        if (seen := getattr(structs[struct], name, "no such field")) != value
    ]
    if not wrong and not _tensor_is_ours(ggml):
        wrong = ["ggml_tensor"]
    if wrong:
        raise NativeMismatch(f"The native struct {wrong[0]} is not laid out as Opsin expects: {MEND}.")


def _tensor_is_ours(ggml: Any) -> bool:
    """Whether our mirror reads the tensors right that ggml makes of a product of f16 [64, 5, 7] and f16 [64, 3, 7]."""
    overhead = ggml.ggml_tensor_overhead()
    if overhead - OBJECT_SIZE != ctypes.sizeof(Tensor):
        return False
    context = ggml.ggml_init(InitParams(16 * overhead, None, True))
    try:
        left = ggml.ggml_new_tensor_4d(context, 1, 64, 5, 7, 1)
        right = ggml.ggml_new_tensor_4d(context, 1, 64, 3, 7, 1)
        ggml.ggml_set_name(left, b"opsin")
        product, factor = Tensor.from_address(ggml.ggml_mul_mat(context, left, right)), Tensor.from_address(left)
        seen = (ggml.ggml_op_name(product.op), product.ne[:], product.src[:3], factor.nb[:], factor.type, factor.name)
        return seen == (b"MUL_MAT", [5, 3, 7, 1], [left, right, None], [2, 128, 640, 4480], 1, b"opsin")
    finally:
        ggml.ggml_free(context)
