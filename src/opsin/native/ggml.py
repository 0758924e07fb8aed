"""The part of ggml's C interface that the bindings leave out.

`Tensor` mirrors `struct ggml_tensor` of the pinned version; `opsin.native.library` compares their sizes.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

from opsin.core.files import read_table

_P, _SIZE, _I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
ToFloat = ctypes.CFUNCTYPE(None, _P, _P, _I64)
"""`ggml_to_float_t` (ggml.h): a block's or row's address, that of its float32 values, and their number."""
_TABLE = read_table(__file__, "ggml.toml")
# The names of types in `ggml.toml`.
_TYPES: dict[str, Any] = {
    "void": None,
    "p": _P,
    "str": ctypes.c_char_p,
    "char": ctypes.c_char,
    "size": _SIZE,
    "int": ctypes.c_int,
    "i32": ctypes.c_int32,
    "i64": _I64,
    "bool": ctypes.c_bool,
    "u8": ctypes.c_uint8,
    "u32": ctypes.c_uint32,
    "size*": ctypes.POINTER(_SIZE),
    "to_float": ToFloat,
}


def _fields(struct: str) -> list[tuple[str, Any]]:
    rows = _TABLE["structs"][struct]
    return [(name, _TYPES[kind] * count[0] if count else _TYPES[kind]) for name, kind, *count in rows]


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml.h)."""

    _fields_ = _fields("tensor")


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` (ggml.h)."""

    _fields_ = _fields("init_params")


class GgufInitParams(ctypes.Structure):
    """`struct gguf_init_params` (gguf.h); `ctx` is the address of a `ggml_context *`, null for none."""

    _fields_ = _fields("gguf_init_params")


class TypeTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits` (ggml.h): `block` values take `size` bytes; f32 has no `to_float`."""

    _fields_ = _fields("type_traits")


_TYPES |= {"params": InitParams, "gguf_params": GgufInitParams, "traits*": ctypes.POINTER(TypeTraits)}


def bind(libraries: list[ctypes.CDLL]) -> SimpleNamespace:
    """The functions of `ggml.toml`, each from the first library that has it. Raises AttributeError where none has."""
    bound: dict[str, Any] = {}
    for result, arguments, names in _TABLE["functions"]:
        for name in names.split():
            holder = next((library for library in libraries if hasattr(library, name)), libraries[0])
            # Item access makes a new function object: nobody else's argtypes are changed.
            bound[name] = holder[name]
            bound[name].argtypes, bound[name].restype = [_TYPES[kind] for kind in arguments.split()], _TYPES[result]
    return SimpleNamespace(**bound)


def op_names(lib: Any) -> list[str]:
    """The operations of ggml, each at its number."""
    names: list[str] = []
    # GGML_OP_COUNT is not exported: the table ends with GLU, and asking past its end would read foreign memory.
    while "GLU" not in names:
        names.append(lib.ggml.ggml_op_name(len(names)).decode())
    return names
