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

# What our mirror of ggml_tensor must read from a product of f16 [64, 5, 7, 1] and f16 [64, 3, 7, 1].
TENSOR: dict[str, Any] = {
    "size": ctypes.sizeof(Tensor),
    "op": "MUL_MAT",
    "shape": (5, 3, 7, 1),
    "left": (1, (64, 5, 7, 1), (2, 128, 640, 4480), b"opsin"),
    "sources": True,
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
    for struct, fields in DEFAULTS.items():
        _compare(struct, {name: getattr(structs[struct], name, "no such field") for name in fields}, fields)
    _compare("ggml_tensor", _read_tensor(ggml), TENSOR)


def _compare(struct: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise NativeMismatch(
                f"The native struct {struct} is not laid out as Opsin expects ({name} is {found.get(name)!r}, not "
                f"{value!r}): {MEND}."
            )


def _read_tensor(ggml: Any) -> dict[str, Any]:
    size = ggml.ggml_tensor_overhead() - OBJECT_SIZE
    if size != TENSOR["size"]:
        return {"size": size}
    context = ggml.ggml_init(InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    try:
        left = ggml.ggml_new_tensor_4d(context, 1, 64, 5, 7, 1)
        right = ggml.ggml_new_tensor_4d(context, 1, 64, 3, 7, 1)
        ggml.ggml_set_name(left, b"opsin")
        product, mirror = Tensor.from_address(ggml.ggml_mul_mat(context, left, right)), Tensor.from_address(left)
        return {
            "size": size,
            "op": ggml.ggml_op_name(product.op).decode(),
            "shape": tuple(product.ne),
            "left": (mirror.type, tuple(mirror.ne), tuple(mirror.nb), mirror.name),
            "sources": (product.src[0], product.src[1], product.src[2]) == (left, right, None),
        }
    finally:
        ggml.ggml_free(context)
