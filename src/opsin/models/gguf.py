"""What a GGUF file says of itself: its header read without a weight, and the facts in it that a user needs.

The only reader of GGUF headers in the package. It steps over arrays (the vocabulary is one), so it takes a few
milliseconds, and a file that lies about its counts or lengths costs no more. Source of the format: llama.cpp's
`ggml/src/gguf.cpp`.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from opsin.core.errors import ModelNotFound, ModelUnreadable
from opsin.core.ggml_types import FILE_TYPES, TENSOR_TYPES
from opsin.models.naming import parts_of

Scalar = int | float | bool | str

# The largest model files known have a few hundred keys, some thousand tensors and half a million merges.
MAX_KEYS = 65_536
MAX_TENSORS = 131_072
MAX_STRING = 16 * 2**20
MAX_STRINGS_OF_ARRAY = 4 * 2**20

_SCALARS = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_STRING, _ARRAY = 8, 9

# How other kinds of file begin, and what to say of them.
_FOREIGN = (
    (b"PK\x03\x04", "is a zip or PyTorch file, not GGUF: convert the model with llama.cpp or pull a GGUF of it"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: fetch the file itself with `git lfs pull`"),
    (b"<!DOCTYPE", "is a web page, not a model: the download went wrong, fetch it again"),
    (b"<html", "is a web page, not a model: the download went wrong, fetch it again"),
    *((magic, "is an old GGML file: get the model as GGUF") for magic in (b"lmgg", b"tjgg", b"fmgg")),
)

# projector type -> (tensor, which of its dimensions is the width handed to the language model).
# Source: `clip_n_mmproj_embd` and the tensor names in llama.cpp's `tools/mtmd/clip.cpp`. A type that is not listed
# is not checked here; llama.cpp checks every pair again when it loads.
_WIDTHS: dict[str, tuple[str, int]] = {
    "mlp": ("mm.2.weight", 1),
    "ldp": ("mm.model.mb_block.1.block.2.1.bias", 0),
    "ldpv2": ("mm.model.peg.0.bias", 0),
    "resampler": ("resampler.proj.weight", 0),
    "adapter": ("adapter.linear.dense_4h_to_h.weight", 1),
    "gemma3": ("mm.input_projection.weight", 0),
    "gemma3nv": ("mm.input_projection.weight", 0),
    "gemma4v": ("mm.input_projection.weight", 1),
    "idefics3": ("mm.model.fc.weight", 1),
    "deepseekocr": ("mm.model.fc.weight", 1),
    "deepseekocr2": ("mm.model.fc.weight", 1),
    "internvl": ("mm.model.mlp.3.weight", 1),
    "glm4v": ("mm.down.weight", 1),
    "janus_pro": ("mm.1.bias", 0),
    **dict.fromkeys(("qwen2vl_merger", "qwen2.5vl_merger", "qwen3vl_merger", "youtuvl"), ("mm.2.bias", 0)),
    **dict.fromkeys(
        ("phi4", "pixtral", "lightonocr", "dots_ocr", "lfm2", "kimivl", "kimik25", "paddleocr"), ("mm.2.weight", 1)
    ),
}


@dataclass(frozen=True, slots=True)
class TensorHead:
    """Name, shape (row length first) and type of a tensor; `end` is where its data ends, bytes from the file's start.

    Type and end are None for a type unknown here.
    """

    name: str
    shape: tuple[int, ...]
    type: str | None
    end: int | None


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata without its arrays (`lengths` has their lengths), and all tensors. `size` is the file's, in bytes."""

    path: Path
    size: int
    metadata: dict[str, Scalar]
    lengths: dict[str, int] = field(repr=False)
    tensors: tuple[TensorHead, ...] = field(repr=False)

    def integer(self, key: str) -> int | None:
        """A metadata value, when it is there and a whole number."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """A metadata value, when it is there and a string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """One GGUF file, or all parts of a split one.

    Widths are in values, `context` in tokens, `image_size` and `patch_size` in pixels, `size` in bytes. `width` is
    what the language model takes in for an image token (with deepstack more than its embedding). What the file does
    not say is None. `tensor_types` counts tensors.
    """

    path: Path
    architecture: str
    name: str | None
    is_projector: bool
    has_vision: bool
    quantisation: str
    size: int
    tensor_types: dict[str, int]
    width: int | None = None
    layers: int | None = None
    context: int | None = None
    projector: str | None = None
    projector_width: int | None = None
    image_size: int | None = None
    patch_size: int | None = None

    @property
    def is_all_f32(self) -> bool:
        """Whether every tensor is f32, as in files called mmproj-F32."""
        return set(self.tensor_types) == {"F32"}


def read_info(path: Path) -> GgufInfo:
    """Read what a file says of itself; of a split model give the first part.

    Raises ModelNotFound (no such file, or a part is missing) and ModelUnreadable (not GGUF, cut short, no model).
    """
    header = read_header(path)
    return info_of([header, *(read_header(part) for part in parts_of(path)[1:])])


def info_of(headers: list[GgufHeader]) -> GgufInfo:
    """What a file says of itself, by the headers of all its parts. Raises ModelUnreadable."""
    header, path = headers[0], headers[0].path
    for part in headers:
        _check_length(part)
    architecture = header.text("general.architecture")
    if architecture is None:
        raise ModelUnreadable(f"{path} does not say what model it holds: general.architecture is missing")
    kind = header.text("general.type")
    if kind in {"adapter", "imatrix"}:
        raise ModelUnreadable(f"{path} is of the kind {kind!r}, not a model: give the model's own GGUF file")
    tensor_types = Counter(tensor.type or "unknown" for part in headers for tensor in part.tensors)
    kind = header.text("clip.projector_type") or header.text("clip.vision.projector_type")
    width = header.integer(f"{architecture}.embedding_length")
    deepstack = header.integer(f"{architecture}.n_deepstack_layers") or 0
    return GgufInfo(
        path=path,
        architecture=architecture,
        name=header.text("general.name"),
        is_projector=architecture == "clip",
        has_vision=bool(header.metadata.get("clip.has_vision_encoder", False)),
        quantisation=_quantisation(header, tensor_types),
        size=sum(part.size for part in headers),
        tensor_types=dict(tensor_types),
        width=None if width is None else width * (1 + deepstack),  # `llama_hparams::n_embd_inp`
        layers=header.integer("clip.vision.block_count" if architecture == "clip" else f"{architecture}.block_count"),
        context=header.integer(f"{architecture}.context_length"),
        projector=kind,
        projector_width=None if kind is None else _projector_width(kind, header),
        image_size=header.integer("clip.vision.image_size"),
        patch_size=header.integer("clip.vision.patch_size"),
    )


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a file.

    Raises ModelNotFound when there is no such file, ModelUnreadable when it is no GGUF file, is cut short, or has more
    keys, tensors or text than any model.
    """
    try:
        if path.is_dir():
            raise ModelUnreadable(f"{path} is a folder, not a GGUF file")
        if not path.is_file() and path.exists():
            raise ModelUnreadable(f"{path} is not a regular file: give a GGUF file")
        with path.open("rb") as file:
            start = file.read(64)
            if start[:4] != b"GGUF":
                raise ModelUnreadable(f"{path} {_foreign(start)}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Cursor(path, view).header()
    except FileNotFoundError as error:
        raise ModelNotFound(
            f"there is no file {path}: check the path, or see what is here with `opsin models`"
        ) from error
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror or error}") from error
    except struct.error as error:
        raise ModelUnreadable(f"{path} ends in the middle of its header: download it again") from error


def _foreign(start: bytes) -> str:
    if not start:
        return "is empty: download it again"
    for magic, text in _FOREIGN:
        if start.startswith(magic):
            return text
    if start[8:9] == b"{":
        return "is a safetensors file, not GGUF: convert the model with llama.cpp or pull a GGUF of it"
    return "is not a GGUF file"


class _Cursor:
    """Walks through one header; struct.error means that the file ends too early."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._at = 4

    def header(self) -> GgufHeader:
        version = self._number(_U32)
        if version not in {2, 3}:
            raise ModelUnreadable(
                f"{self._path} is big-endian GGUF, which this machine does not read"
                if version & 0xFFFF == 0
                else f"{self._path} is GGUF version {version}: only versions 2 and 3 are read"
            )
        tensor_count, key_count = self._number(_U64), self._number(_U64)
        # Each key takes at least 13 bytes and each tensor 24: a count that the file cannot hold is a cut file.
        if 13 * key_count + 24 * tensor_count > self._size - self._at:
            raise struct.error
        for count, most, what in (key_count, MAX_KEYS, "keys"), (tensor_count, MAX_TENSORS, "tensors"):
            if count > most:
                raise self._broken(f"{count:,} {what}, and a model has {most:,} at most")
        metadata: dict[str, Scalar] = {}
        lengths: dict[str, int] = {}
        for _ in range(key_count):
            key = self._string()
            kind = self._number(_U32)
            if kind == _ARRAY:
                lengths[key] = self._skip_array()
            else:
                metadata[key] = self._scalar(kind)
        raw = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._broken(f"a data alignment of {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors = tuple(
            TensorHead(name, shape, kind, None if end is None else data + end) for name, shape, kind, end in raw
        )
        return GgufHeader(self._path, self._size, metadata, lengths, tensors)

    def _number(self, code: struct.Struct) -> int:
        value: int = code.unpack_from(self._view, self._at)[0]
        self._at += code.size
        return value

    def _string(self) -> str:
        length = self._number(_U64)
        start = self._at
        self._skip(length)
        if length > MAX_STRING:
            raise self._broken(f"a text of {length:,} bytes")
        return self._view[start : self._at].decode("utf-8", "replace")

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > self._size:
            raise struct.error

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string()
        code = _SCALARS.get(kind)
        if code is None:
            raise self._broken(f"a value of the unknown kind {kind}")
        return self._number(code)

    def _skip_array(self) -> int:
        kind, count = self._number(_U32), self._number(_U64)
        if kind in _SCALARS:
            self._skip(count * _SCALARS[kind].size)
        elif kind == _STRING:
            if 8 * count > self._size - self._at:
                raise struct.error
            if count > MAX_STRINGS_OF_ARRAY:
                raise self._broken(f"a list of {count:,} texts")
            view, at, size, read = self._view, self._at, self._size, _U64.unpack_from
            for _ in range(count):
                at += 8 + read(view, at)[0]
                if at > size:
                    raise struct.error
            self._at = at
        else:
            raise self._broken("an array of a kind llama.cpp does not read")
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], str | None, int | None]:
        name = self._string()
        dimensions = self._number(_U32)
        if dimensions > 4:
            raise self._broken(f"the tensor {name[:64]!r} of {dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(dimensions))
        kind, offset = self._number(_U32), self._number(_U64)
        if kind not in TENSOR_TYPES:
            return name, shape, None, None
        type_name, values, size = TENSOR_TYPES[kind]
        return name, shape, type_name, offset + prod(shape) // values * size

    def _broken(self, what: str) -> ModelUnreadable:
        return ModelUnreadable(f"{self._path} is a damaged GGUF file (it holds {what}): download it again")


def _check_length(header: GgufHeader) -> None:
    needed = max((tensor.end for tensor in header.tensors if tensor.end is not None), default=0)
    if needed > header.size:
        missing = (needed - header.size) / needed
        raise ModelUnreadable(f"{header.path} is cut short, {missing:.0%} of it is missing: download it again")


def _quantisation(header: GgufHeader, tensor_types: Counter[str]) -> str:
    """The file's own word for it, else the type of most of its tensors that are not plain f32."""
    named = FILE_TYPES.get(header.integer("general.file_type") or 0)
    if "general.file_type" in header.metadata and named is not None:
        return named
    weights = {kind: count for kind, count in tensor_types.items() if kind != "F32"}
    return max(weights, key=lambda kind: weights[kind], default="F32")


def _projector_width(kind: str, header: GgufHeader) -> int | None:
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    name, dimension = _WIDTHS.get(kind, ("", 0))
    if kind == "mlp" and "mm.3.bias" in shapes:  # LLaVA of the Yi kind, which llama.cpp tells by its tensors alone
        name, dimension = "mm.3.bias", 0
    shape = shapes.get(name, ())
    if len(shape) <= dimension:
        return None
    deepstack = sum(name.startswith("v.deepstack.") and name.endswith(".fc1.weight") for name in shapes)
    return shape[dimension] * (1 + deepstack if kind == "qwen3vl_merger" else 1)
