"""The part of ggml's C interface that the bindings leave out.

`Tensor` mirrors `struct ggml_tensor` of the pinned version; `opsin.native.library` compares their sizes.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

_P, _STR, _SIZE, _INT, _BOOL = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_bool
_I64 = ctypes.c_int64


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml.h)."""

    _fields_ = [
        ("type", _INT),
        ("buffer", _P),
        ("ne", _I64 * 4),
        ("nb", _SIZE * 4),
        ("op", _INT),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _P * 10),
        ("view_src", _P),
        ("view_offs", _SIZE),
        ("data", _P),
        ("name", ctypes.c_char * 64),
        ("extra", _P),
        ("padding", ctypes.c_char * 8),
    ]


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` (ggml.h)."""

    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", _BOOL)]


class GgufInitParams(ctypes.Structure):
    """`struct gguf_init_params` (gguf.h); `ctx` is the address of a `ggml_context *`, null for none."""

    _fields_ = [("no_alloc", _BOOL), ("ctx", _P)]


ToFloat = ctypes.CFUNCTYPE(None, _P, _P, _I64)
"""`ggml_to_float_t` (ggml.h): a block's or row's address, that of its float32 values, and their number."""


class TypeTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits` (ggml.h): `block` values take `size` bytes; f32 has no `to_float`."""

    _fields_ = [
        ("name", _STR),
        ("block", _I64),
        ("interleave", _I64),
        ("size", _SIZE),
        ("is_quantized", _BOOL),
        ("to_float", ToFloat),
    ]


# Result and arguments, and the functions that have these.
_FUNCTIONS: list[tuple[Any, list[Any], str]] = [
    (None, [_P], "ggml_free gguf_free ggml_backend_free ggml_backend_synchronize ggml_backend_buffer_free"),
    (None, [_P, _P], "ggml_build_forward_expand"),
    (None, [_P, ctypes.c_uint8], "ggml_backend_buffer_clear"),
    (None, [_P, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)], "ggml_backend_dev_memory"),
    (_SIZE, [], "ggml_tensor_overhead ggml_graph_overhead ggml_backend_dev_count ggml_backend_reg_count"),
    (_INT, [_P], "ggml_backend_dev_type"),
    (_INT, [_P, _P], "ggml_backend_graph_compute"),
    (_INT, [_P, _I64], "gguf_get_kv_type gguf_get_tensor_type"),
    (_I64, [_P, _STR], "gguf_find_key gguf_find_tensor"),
    (_SIZE, [_P], "gguf_get_data_offset"),
    (_SIZE, [_P, _I64], "gguf_get_tensor_offset gguf_get_tensor_size"),
    (ctypes.POINTER(TypeTraits), [_INT], "ggml_get_type_traits"),
    (_BOOL, [_P], "ggml_backend_buft_is_host"),
    (_STR, [], "ggml_commit"),
    (_STR, [_INT], "ggml_op_name"),
    (_STR, [_P], "ggml_backend_buffer_name ggml_backend_dev_name ggml_backend_dev_description ggml_backend_reg_name"),
    (_STR, [_P, _I64], "gguf_get_val_str"),
    (ctypes.c_uint32, [_P, _I64], "gguf_get_val_u32"),
    (_P, [_P], "ggml_new_graph ggml_backend_buffer_get_type ggml_backend_buft_get_device ggml_backend_dev_backend_reg"),
    (_P, [_P, _P], "ggml_backend_alloc_ctx_tensors"),
    (_P, [_P, _STR], "ggml_backend_dev_init ggml_backend_reg_get_proc_address"),
    (_P, [_P, _P, _P], "ggml_mul_mat"),
    (_P, [_P, _INT, _I64, _I64, _I64, _I64], "ggml_new_tensor_4d"),
    (_P, [_SIZE], "ggml_backend_dev_get ggml_backend_reg_get"),
    (_P, [InitParams], "ggml_init"),
    (_P, [_STR, GgufInitParams], "gguf_init_from_file"),
]


def bind(libraries: list[ctypes.CDLL]) -> SimpleNamespace:
    """The functions above, each from the first library that has it. Raises AttributeError where none has."""
    bound: dict[str, Any] = {}
    for result, arguments, names in _FUNCTIONS:
        for name in names.split():
            holder = next((library for library in libraries if hasattr(library, name)), libraries[0])
            # Item access makes a new function object: nobody else's argtypes are changed.
            bound[name] = holder[name]
            bound[name].argtypes, bound[name].restype = arguments, result
    return SimpleNamespace(**bound)


def op_names(lib: Any) -> list[str]:
    """The operations of ggml, each at its number."""
    names: list[str] = []
    # GGML_OP_COUNT is not exported: the table ends with GLU, and asking past its end would read foreign memory.
    while "GLU" not in names:
        names.append(lib.ggml.ggml_op_name(len(names)).decode())
    return names
