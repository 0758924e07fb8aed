"""What a projector's header says, read through llama.cpp's own GGUF functions.

The rooms above read headers themselves (`opsin.models`), so a damaged file is refused before it comes here.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.core.errors import ModelNotFound, ModelUnreadable
from opsin.native.ggml import GgufInitParams

_STRING = 8  # gguf_type
_F32 = 0  # ggml_type

_WHOLE_FILE = 16 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ProjectorFile:
    """What a projector says of itself; `kind` is its type ("mlp", "gemma3", …), empty when it names none.

    `header_bytes` is where the weights begin, `all_f32` whether not one tensor is of a smaller type.
    """

    architecture: str
    kind: str
    header_bytes: int
    all_f32: bool


def read_projector(path: Path) -> ProjectorFile:
    """Read the header of a projector file.

    Raises NativeMismatch, ModelNotFound, or ModelUnreadable when the file is no GGUF file or was cut off.
    """
    from opsin.native.library import library

    if not path.exists():
        raise ModelNotFound(f"There is no projector file {path}: check the path given to --mmproj.")
    ggml = library().ggml
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not file:
        raise ModelUnreadable(f"{path.name} is not a whole GGUF file: download it again.")
    try:
        types = {ggml.gguf_get_tensor_type(file, index) for index in range(ggml.gguf_get_n_tensors(file))}
        kind = _text(ggml, file, b"clip.vision.projector_type") or _text(ggml, file, b"clip.projector_type")
        architecture = _text(ggml, file, b"general.architecture")
        return ProjectorFile(architecture, kind, ggml.gguf_get_data_offset(file), types == {_F32})
    finally:
        ggml.gguf_free(file)


def _text(ggml: Any, file: int, key: bytes) -> str:
    at = ggml.gguf_find_key(file, key)
    if at < 0 or ggml.gguf_get_kv_type(file, at) != _STRING:
        return ""
    return str(ggml.gguf_get_val_str(file, at).decode("utf-8", "replace"))


def fingerprint(path: Path, header_bytes: int) -> str:
    """A name for the file's content, 32 hex digits.

    It goes into every image identity, so it must follow the content and not the path or the time of change. Small
    files are hashed whole. Of large ones (0.6 GB for LLaVA-1.5, half a second to hash at every start) the size, the
    whole header and 64 blocks spread evenly over the weights are hashed: two trainings differ in nearly every weight,
    and a file cut or padded differs in size.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(b"opsin projector 1\n" + struct.pack("<Q", size))
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            digest.update(file.read())
        else:
            digest.update(file.read(header_bytes))
            span = size - header_bytes - _SAMPLE_BYTES
            for index in range(_SAMPLES):
                file.seek(header_bytes + span * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
