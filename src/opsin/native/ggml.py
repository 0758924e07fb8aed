"""The part of ggml's C interface that the bindings leave out: devices, buffers, and a look into tensors.

`Tensor` mirrors `struct ggml_tensor` of the pinned version; `opsin.native.abi` compares its size and a tensor of known
shape with it before anything is read through it.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

_P = ctypes.c_void_p
_STR = ctypes.c_char_p
_SIZE = ctypes.c_size_t
_INT = ctypes.c_int

MAX_DIMS = 4
MAX_SRC = 10


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml.h)."""

    _fields_ = [
        ("type", _INT),
        ("buffer", _P),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", _SIZE * MAX_DIMS),
        ("op", _INT),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _P * MAX_SRC),
        ("view_src", _P),
        ("view_offs", _SIZE),
        ("data", _P),
        ("name", ctypes.c_char * 64),
        ("extra", _P),
        ("padding", ctypes.c_char * 8),
    ]


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` (ggml.h)."""

    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool)]


class GgufInitParams(ctypes.Structure):
    """`struct gguf_init_params` (gguf.h); `ctx` is the address of a `ggml_context *`, null for none."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", _P)]


# ggml_object in front of each tensor of a context (ggml.c), counted by ggml_tensor_overhead.
OBJECT_SIZE = 32

_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([InitParams], _P),
    "ggml_free": ([_P], None),
    "ggml_new_tensor_4d": ([_P, _INT, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64], _P),
    "ggml_mul_mat": ([_P, _P, _P], _P),
    "ggml_set_name": ([_P, _STR], _P),
    "ggml_tensor_overhead": ([], _SIZE),
    "ggml_get_tensor": ([_P, _STR], _P),
    "gguf_init_from_file": ([_STR, GgufInitParams], _P),
    "gguf_init_empty": ([], _P),
    "gguf_free": ([_P], None),
    "gguf_find_key": ([_P, _STR], ctypes.c_int64),
    "gguf_get_kv_type": ([_P, ctypes.c_int64], _INT),
    "gguf_get_val_str": ([_P, ctypes.c_int64], _STR),
    "gguf_get_val_u32": ([_P, ctypes.c_int64], ctypes.c_uint32),
    "gguf_get_data_offset": ([_P], _SIZE),
    "gguf_get_n_tensors": ([_P], ctypes.c_int64),
    "gguf_get_tensor_name": ([_P, ctypes.c_int64], _STR),
    "gguf_get_tensor_type": ([_P, ctypes.c_int64], _INT),
    "gguf_get_tensor_size": ([_P, ctypes.c_int64], _SIZE),
    "gguf_set_kv": ([_P, _P], None),
    "gguf_set_val_u32": ([_P, _STR, ctypes.c_uint32], None),
    "gguf_add_tensor": ([_P, _P], None),
    "gguf_write_to_file": ([_P, _STR, ctypes.c_bool], ctypes.c_bool),
    "ggml_op_name": ([_INT], _STR),
    "ggml_backend_buffer_name": ([_P], _STR),
    "ggml_backend_buffer_get_type": ([_P], _P),
    "ggml_backend_buft_is_host": ([_P], ctypes.c_bool),
    "ggml_backend_buft_get_device": ([_P], _P),
    "ggml_backend_dev_count": ([], _SIZE),
    "ggml_backend_dev_get": ([_SIZE], _P),
    "ggml_backend_dev_name": ([_P], _STR),
    "ggml_backend_dev_description": ([_P], _STR),
    "ggml_backend_dev_memory": ([_P, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)], None),
    "ggml_backend_dev_type": ([_P], _INT),
    "ggml_backend_reg_count": ([], _SIZE),
    "ggml_backend_reg_get": ([_SIZE], _P),
    "ggml_backend_reg_name": ([_P], _STR),
    "ggml_version": ([], _STR),
    "ggml_commit": ([], _STR),
    "ggml_backend_dev_init": ([_P, _STR], _P),
    "ggml_backend_dev_backend_reg": ([_P], _P),
    "ggml_backend_reg_get_proc_address": ([_P, _STR], _P),
    "ggml_backend_free": ([_P], None),
    "ggml_backend_synchronize": ([_P], None),
    "ggml_backend_alloc_ctx_tensors": ([_P, _P], _P),
    "ggml_backend_buffer_clear": ([_P, ctypes.c_uint8], None),
    "ggml_backend_buffer_free": ([_P], None),
    "ggml_backend_graph_compute": ([_P, _P], _INT),
    "ggml_new_graph": ([_P], _P),
    "ggml_graph_overhead": ([], _SIZE),
    "ggml_build_forward_expand": ([_P, _P], None),
}


def bind(libraries: list[ctypes.CDLL]) -> tuple[SimpleNamespace, list[str]]:
    """The functions above, each from the first library that has it, and the names that none has."""
    bound: dict[str, Any] = {}
    missing: list[str] = []
    for name, (argtypes, restype) in _FUNCTIONS.items():
        for library in libraries:
            try:
                # Item access makes a new function object: nobody else's argtypes are changed.
                function = library[name]
            except AttributeError:
                continue
            function.argtypes, function.restype = argtypes, restype
            bound[name] = function
            break
        else:
            missing.append(name)
    return SimpleNamespace(**bound), missing
