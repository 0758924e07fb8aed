"""A projector's header, through llama.cpp's own GGUF functions: what it says of itself, and a copy without weights.

The rooms above read headers themselves (`opsin.models`), so a damaged file is refused before it comes here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.core.errors import ModelNotFound, ModelUnreadable
from opsin.native.ggml import GgufInitParams

_UINT32, _STRING = 4, 8  # gguf_type
_F32 = 0  # ggml_type
_ALIGNMENT = 32
_BLOCK = re.compile(rb"v\.blk\.(\d+)\.")
_LAYERS = b"clip.vision.block_count"

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
    with _opened(path, None) as (ggml, file):

        def text(key: bytes) -> str:
            at = ggml.gguf_find_key(file, key)
            if at < 0 or ggml.gguf_get_kv_type(file, at) != _STRING:
                return ""
            return str(ggml.gguf_get_val_str(file, at).decode("utf-8", "replace"))

        types = {ggml.gguf_get_tensor_type(file, index) for index in range(ggml.gguf_get_n_tensors(file))}
        kind = text(b"clip.vision.projector_type") or text(b"clip.projector_type")
        return ProjectorFile(text(b"general.architecture"), kind, ggml.gguf_get_data_offset(file), types == {_F32})


def shorten(source: Path, target: Path, layers: int) -> None:
    """A copy of a projector file with its first `layers` layers and without weights: holes of a sparse file.

    Raises ModelNotFound, or ModelUnreadable for a file that is no projector in GGUF.
    """
    tensors = ctypes.c_void_p()
    with _opened(source, tensors) as (ggml, file):
        at = ggml.gguf_find_key(file, _LAYERS)
        if at < 0 or ggml.gguf_get_kv_type(file, at) != _UINT32:
            raise ModelUnreadable(f"{source.name} is no projector with a vision encoder: give another with --mmproj.")
        short = ggml.gguf_init_empty()
        try:
            ggml.gguf_set_kv(short, file)
            ggml.gguf_set_val_u32(short, _LAYERS, min(layers, ggml.gguf_get_val_u32(file, at)))
            weights = 0
            for index in range(ggml.gguf_get_n_tensors(file)):
                name = ggml.gguf_get_tensor_name(file, index)
                block = _BLOCK.match(name)
                if block is None or int(block[1]) < layers:
                    ggml.gguf_add_tensor(short, ggml.ggml_get_tensor(tensors, name))
                    weights += -(-ggml.gguf_get_tensor_size(file, index) // _ALIGNMENT) * _ALIGNMENT
            if not ggml.gguf_write_to_file(short, os.fsencode(target), True):
                raise ModelUnreadable(f"{target} cannot be written: free some space for temporary files.")
            os.truncate(target, target.stat().st_size + weights)
        finally:
            ggml.gguf_free(short)


@contextmanager
def _opened(path: Path, tensors: ctypes.c_void_p | None) -> Iterator[tuple[Any, Any]]:
    """Ggml's functions and a GGUF context of the file; `tensors` receives a ggml context of its tensors, unfilled."""
    from opsin.native.library import library

    if not path.exists():
        raise ModelNotFound(f"There is no projector file {path}: check the path given to --mmproj.")
    ggml = library().ggml
    wanted = None if tensors is None else ctypes.cast(ctypes.byref(tensors), ctypes.c_void_p)
    file = ggml.gguf_init_from_file(os.fsencode(path), GgufInitParams(True, wanted))
    if not file:
        raise ModelUnreadable(f"{path.name} is not a whole GGUF file: download it again.")
    try:
        yield ggml, file
    finally:
        ggml.gguf_free(file)
        if tensors is not None and tensors.value:
            ggml.ggml_free(tensors)


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
