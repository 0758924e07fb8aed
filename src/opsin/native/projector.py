"""What a projector file says of itself, read before llama.cpp opens it.

Only the header is read: metadata and tensor names. It is enough to refuse the wrong file with a sentence, and to name
the file's content.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from opsin.core.errors import ModelNotFound, ModelUnreadable

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32 = 0
_MAX_ENTRIES = 1_000_000
_MAX_STRING = 64 * 2**20

_WHOLE_FILE = 16 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class ProjectorFile:
    """A projector's header. `tensor_types` are ggml types by tensor name; `header_bytes` is where it ends."""

    metadata: dict[str, Any]
    header_bytes: int
    tensor_types: dict[str, int] = field(repr=False, default_factory=dict)

    @property
    def kind(self) -> str:
        """The projector type ("mlp", "gemma3", …), empty when the file names none."""
        for key in ("clip.vision.projector_type", "clip.projector_type"):
            if isinstance(self.metadata.get(key), str):
                return str(self.metadata[key])
        return ""

    @property
    def all_f32(self) -> bool:
        """Whether not one tensor is of a smaller type."""
        return bool(self.tensor_types) and set(self.tensor_types.values()) == {_F32}


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise EOFError
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if size > _MAX_STRING:
            raise EOFError
        return self.take(size).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if count > _MAX_ENTRIES or depth:
                raise EOFError
            return [self.value(inner, depth + 1) for _ in range(count)]
        return self.scalar(_SCALARS[kind])


def read_projector(path: Path) -> ProjectorFile:
    """Read the header of a projector file.

    Raises ModelNotFound, or ModelUnreadable when the file is no GGUF file or was cut off.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except FileNotFoundError as error:
        raise ModelNotFound(f"There is no projector file {path}: check the path given to --mmproj.") from error
    except (EOFError, KeyError, struct.error, ValueError) as error:
        raise ModelUnreadable(f"{path.name} is not a whole GGUF file: download it again.") from error
    except OSError as error:
        raise ModelUnreadable(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error


def _read(file: BinaryIO) -> ProjectorFile:
    reader = _Reader(file)
    if reader.take(4) != _MAGIC:
        raise ValueError("no GGUF magic")
    reader.scalar("I")
    n_tensors, n_pairs = reader.scalar("Q"), reader.scalar("Q")
    if max(n_tensors, n_pairs) > _MAX_ENTRIES:
        raise EOFError
    metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(n_pairs)}
    by_name: dict[str, int] = {}
    for _ in range(n_tensors):
        name = reader.string()
        n_dims = reader.scalar("I")
        if n_dims > 8:
            raise EOFError
        reader.take(8 * n_dims)
        kind = reader.scalar("I")
        reader.scalar("Q")
        by_name[name] = kind
    return ProjectorFile(metadata, file.tell(), by_name)


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
