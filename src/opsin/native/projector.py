"""What type a projector is, read through llama.cpp's own GGUF functions, and a name for its content."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opsin.core.errors import ModelUnreadable
from opsin.native.ggml import GgufInitParams
from opsin.native.library import library

_KEYS = (b"clip.vision.projector_type", b"clip.projector_type")
_ROW_END = b"v.token_embd.img_break"
_IMAGE_SIZE, _GRID = b"clip.vision.image_size", b"clip.vision.image_grid_pinpoints"
# Whose images llama.cpp brings to one size, unless their file has a grid of other sizes (mtmd.cpp).
_ONE_SIZE = frozenset({"mlp", "mlp_norm", "ldp", "ldpv2", "cogvlm", "janus_pro", "adapter", "gemma3"})
_STRING, _UINT32, _F32 = 8, 4, 0  # gguf_type, gguf_type, ggml_type
_WHOLE_FILE = 16 * 2**20
_HEAD_BYTES = 2**20  # more than the header of any projector
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


class Projector(NamedTuple):
    """The type as llama.cpp names it, as "mlp" (or ""), and the edge in pixels that all images get (0: not the same).

    `row_end` is what Pixtral has behind each row: an embedding, float32 [n_embd], None for others. llama.cpp adds it to
    0 times memory that it never wrote (`models/pixtral.cpp`), which is not 0 if that holds a NaN.
    """

    kind: str
    edge: int = 0
    row_end: NDArray[np.float32] | None = None


def read_projector(path: Path) -> Projector:
    """What a projector's header says. Raises ModelUnreadable."""
    ggml = library().ggml
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not file:
        raise ModelUnreadable(f"{path} is missing or not a whole GGUF file: check --mmproj, or download it again.")
    try:
        found = [at for key in _KEYS if (at := ggml.gguf_find_key(file, key)) >= 0]
        names = [ggml.gguf_get_val_str(file, at) for at in found if ggml.gguf_get_kv_type(file, at) == _STRING]
        kind, edge = names[0].decode("utf-8", "replace") if names else "", 0
        at = ggml.gguf_find_key(file, _IMAGE_SIZE) if kind in _ONE_SIZE and ggml.gguf_find_key(file, _GRID) < 0 else -1
        if at >= 0 and ggml.gguf_get_kv_type(file, at) == _UINT32:
            edge = ggml.gguf_get_val_u32(file, at)
        at = ggml.gguf_find_tensor(file, _ROW_END)
        if at < 0 or ggml.gguf_get_tensor_type(file, at) != _F32:
            return Projector(kind, edge)
        offset = ggml.gguf_get_data_offset(file) + ggml.gguf_get_tensor_offset(file, at)
        size = ggml.gguf_get_tensor_size(file, at) // 4
        return Projector(kind, edge, np.fromfile(path, np.float32, size, offset=offset))
    finally:
        ggml.gguf_free(file)


def fingerprint(path: Path) -> str:
    """A name for the file's content, 32 hex digits, which goes into the identity of every image.

    Small files are hashed whole. Of large ones (0.6 GB for LLaVA-1.5, half a second to hash at every start) the size,
    the header and 64 blocks spread evenly over the weights are: two trainings differ in nearly every weight.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(b"opsin projector 2\n" + size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_WHOLE_FILE if size <= _WHOLE_FILE else _HEAD_BYTES))
        for index in range(_SAMPLES if size > _WHOLE_FILE else 0):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
