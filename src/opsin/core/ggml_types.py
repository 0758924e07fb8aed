"""ggml's tensor types and llama.cpp's file types, for every room: `ggml_types.toml` beside this file has the tables."""

from opsin.core.files import read_table

_TABLES = read_table(__file__, "ggml_types.toml")

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    int(number): (name, values, size) for number, (name, values, size) in _TABLES["tensor_types"].items()
}
"""ggml_type -> name, values in a block, bytes of a block."""
FILE_TYPES: dict[int, str] = {int(number): name for number, name in _TABLES["file_types"].items()}
"""llama_ftype -> name."""
KV_TYPES: dict[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
"""Types that the KV cache may have (`core.settings.KvType`), as ggml_type."""
_BYTES = {name: size / values for name, values, size in TENSOR_TYPES.values()}


def bytes_per_value(kind: str) -> float:
    """Bytes that one value of a tensor type takes, blocks included; `kind` as "f16" or "Q8_0". Raises KeyError."""
    return _BYTES[kind.upper()]
