"""What a projector's header says, read through llama.cpp's own GGUF functions, and a name for its content."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from opsin.core.errors import ModelNotFound, ModelUnreadable
from opsin.native.ggml import GgufInitParams
from opsin.native.library import library

_STRING = 8  # gguf_type
_WHOLE_FILE = 16 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ProjectorFile:
    """`kind` is the projector type ("mlp", "gemma3"), empty when it names none; weights begin at `header_bytes`."""

    architecture: str
    kind: str
    header_bytes: int


def read_projector(path: Path) -> ProjectorFile:
    """Read the header of a projector file.

    Raises NativeMismatch, ModelNotFound, or ModelUnreadable when the file is no GGUF file or was cut off.
    """
    if not path.exists():
        raise ModelNotFound(f"There is no projector file {path}: check the path given to --mmproj.")
    ggml = library().ggml
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, None))
    if not file:
        raise ModelUnreadable(f"{path.name} is not a whole GGUF file: download it again.")

    def text(key: bytes) -> str:
        at = ggml.gguf_find_key(file, key)
        known = at >= 0 and ggml.gguf_get_kv_type(file, at) == _STRING
        return str(ggml.gguf_get_val_str(file, at).decode("utf-8", "replace")) if known else ""

    try:
        kind = text(b"clip.vision.projector_type") or text(b"clip.projector_type")
        return ProjectorFile(text(b"general.architecture"), kind, ggml.gguf_get_data_offset(file))
    finally:
        ggml.gguf_free(file)


def fingerprint(path: Path, header_bytes: int) -> str:
    """A name for the file's content, 32 hex digits, which goes into the identity of every image.

    Small files are hashed whole. Of large ones (0.6 GB for LLaVA-1.5, half a second to hash at every start) the size,
    the whole header and 64 blocks spread evenly over the weights are: two trainings differ in nearly every weight.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(b"opsin projector 1\n" + size.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(_WHOLE_FILE if size <= _WHOLE_FILE else header_bytes))
        span = size - header_bytes - _SAMPLE_BYTES
        for index in range(_SAMPLES if size > _WHOLE_FILE else 0):
            file.seek(header_bytes + span * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
