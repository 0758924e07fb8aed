"""GGUF files: what their names tell, and what their headers say, read without a weight.

The rules for names are those of llama.cpp's `common/download.cpp`, so that both agree on the files of a repository;
names are paths with forward slashes, relative to a repository or a folder. Of the header (llama.cpp's
`ggml/src/gguf.cpp`) arrays are skipped, so reading takes a few milliseconds, also where a file lies about its counts.
"""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from opsin.core.errors import ModelNotFound, ModelUnreadable
from opsin.core.files import read_table
from opsin.core.ggml_types import FILE_TYPES, TENSOR_TYPES

Scalar = int | float | bool | str

# The largest model files known have a few hundred keys, some thousand tensors and half a million merges.
MAX_KEYS = 65_536
MAX_TENSORS = 131_072
MAX_STRING = 16 * 2**20
MAX_STRINGS_OF_ARRAY = 4 * 2**20

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_U32, _STRING, _ARRAY, _U64 = 4, 8, 9, 10

_FOREIGN = read_table(__file__, "foreign.toml")["foreign"]

_NAME = re.compile(r"(?P<prefix>.+?)(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.gguf", re.DOTALL)
_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)$")
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_NAMES = re.compile(r"general\.(name|basename|base_model\.\d+\.(name|repo_url))")


@dataclass(frozen=True, slots=True)
class ProjectorType:
    """What llama.cpp knows of one type of projector; `projectors.toml` says what the fields mean."""

    width: tuple[str, int] = ("", 0)
    merge: int = 1
    least_tokens: int = 0
    most_tokens: int | None = None
    keeps_size: bool = False
    limited: bool = False
    one_size: bool = False
    whole: bool = False


PROJECTOR_TYPES = {name: ProjectorType(**row) for name, row in read_table(__file__, "projectors.toml").items()}


class GgufName(NamedTuple):
    """A file name taken apart: `prefix` is the path without part numbers, `tag` the last word of it in capitals."""

    prefix: str
    tag: str = ""
    part: int = 0
    parts: int = 1


def take_apart(path: str) -> GgufName:
    """The pieces of a GGUF file's name; of any other file's name the whole, as part 0."""
    found = _NAME.fullmatch(path)
    if found is None:
        return GgufName(path)
    tag = _TAG.search(found["prefix"])
    return GgufName(found["prefix"], tag[1].upper() if tag else "", int(found["part"] or 1), int(found["parts"] or 1))


def stem(path: str) -> str:
    """The name without its tag and part numbers, in small letters: what the quantisations of one model share."""
    name = take_apart(path)
    return name.prefix.lower().removesuffix(name.tag.lower()).rstrip("-.")


def is_model(path: str) -> bool:
    """Whether a file is a language model by its name, and the first part of it."""
    file = path.rpartition("/")[2]
    return take_apart(path).part == 1 and not any(word in file for word in _NOT_MODELS)


def is_projector(path: str) -> bool:
    """Whether a file is a projector by its name."""
    return path.endswith(".gguf") and "mmproj" in path.rpartition("/")[2]


def best_model(paths: Iterable[str], tag: str = "", usual: str = "") -> str | None:
    """The language model meant by a quantisation tag; without one the usual, else Q4_K_M, else Q8_0, else the first."""
    models = [path for path in paths if is_model(path)]
    for wanted in [tag] if tag else filter(None, (usual, "Q4_K_M", "Q8_0")):
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        if found := next(filter(pattern.search, models), None):
            return found
    return models[0] if models and not tag else None


def best_projectors(paths: Iterable[str], model: str) -> list[str]:
    """Projectors that may belong to a model: the nearest folder (its own or above) first, then the nearest bits."""
    folders = model.split("/")[:-1]
    beside = [path for path in paths if is_projector(path) and path.split("/")[:-1] == folders[: path.count("/")]]
    return sorted(beside, key=lambda path: (-path.count("/"), abs(_bits(path) - _bits(model))))


def _bits(path: str) -> int:
    """4 for Q4_K_M, 16 for F16; 0 when the tag has no number."""
    number = re.search(r"\d+", take_apart(path).tag)
    return int(number[0]) if number else 0


def part_names(path: str) -> Sequence[str]:
    """The names of all parts of a model, in order; the file alone when it is whole."""
    name = take_apart(path)
    if name.parts == 1:
        return [path]
    return [f"{name.prefix}-{index:05d}-of-{name.parts:05d}.gguf" for index in range(1, name.parts + 1)]


def parts_of(path: Path) -> Sequence[Path]:
    """All files of a model on disk, in order. Raises ModelNotFound when a part is missing or `path` is a later one."""
    parts = [path.with_name(name) for name in part_names(path.name)]
    if path.name != parts[0].name:
        raise ModelNotFound(f"{path.name} is a later part of a split model: give {parts[0].name}")
    missing = [part.name for part in parts[1:] if not part.exists()]
    if missing:
        raise ModelNotFound(f"{path} is one of {len(parts)} parts and {missing[0]} is missing: download all parts")
    return parts


@dataclass(frozen=True, slots=True)
class TensorHead:
    """A tensor's shape (row length first), type (None and `size` 0 where unknown), offset in the file's data, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str | None
    offset: int
    size: int = 0


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata without its arrays (`lengths` has their lengths), and all tensors.

    `size` is the file's, in bytes; the tensors' data begin at `data`.
    """

    path: Path
    size: int
    data: int
    metadata: dict[str, Scalar]
    lengths: dict[str, int] = field(repr=False)
    tensors: tuple[TensorHead, ...] = field(repr=False)

    def integer(self, key: str) -> int | None:
        """A metadata value, when it is there and a whole number."""
        value = self.metadata.get(key)
        return value if type(value) is int else None

    def text(self, key: str) -> str | None:
        """A metadata value, when it is there and a string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """One GGUF file, or all parts of a split one: `context` in tokens, `size` in bytes; None where it does not say.

    `width` is what the language model takes in for an image token (with deepstack more than its embedding).
    `is_all_f32`: every tensor is f32, as in files called mmproj-F32. `names`: of the model and of what it is based on,
    in small letters with dashes.
    """

    path: Path
    architecture: str
    name: str | None
    is_projector: bool
    has_vision: bool
    quantisation: str
    size: int
    is_all_f32: bool
    width: int | None = None
    context: int | None = None
    projector: str | None = None
    projector_width: int | None = None
    names: str = ""


def read_info(path: Path) -> GgufInfo:
    """Read what a file says of itself; of a split model give the first part.

    Raises ModelNotFound (no such file, or a part is missing) and ModelUnreadable (not GGUF, cut short, no model).
    """
    return info_of([read_header(path), *(read_header(part) for part in parts_of(path)[1:])])


def info_of(headers: list[GgufHeader]) -> GgufInfo:
    """What a file says of itself, by the headers of all its parts. Raises ModelUnreadable."""
    header, path = headers[0], headers[0].path
    for part in headers:
        needed = max((part.data + tensor.offset + tensor.size for tensor in part.tensors), default=0)
        if needed > part.size:
            missing = (needed - part.size) / needed
            raise ModelUnreadable(f"{part.path} is cut short, {missing:.0%} of it is missing: download it again")
    architecture = header.text("general.architecture")
    if architecture is None:
        raise ModelUnreadable(f"{path} does not say what model it holds: general.architecture is missing")
    kind = header.text("general.type")
    if kind in {"adapter", "imatrix"}:
        raise ModelUnreadable(f"{path} is of the kind {kind!r}, not a model: give the model's own GGUF file")
    types = (tensor.type or "unknown" for part in headers for tensor in part.tensors)
    weights = Counter(kind for kind in types if kind != "F32")
    named = FILE_TYPES.get(found) if (found := header.integer("general.file_type")) is not None else None
    projector = header.text("clip.projector_type") or header.text("clip.vision.projector_type")
    called = (header.text(key) or "" for key in header.metadata if _NAMES.fullmatch(key))
    width = header.integer(f"{architecture}.embedding_length")
    deepstack = header.integer(f"{architecture}.n_deepstack_layers") or 0
    return GgufInfo(
        path=path,
        architecture=architecture,
        name=header.text("general.name"),
        is_projector=architecture == "clip",
        has_vision=bool(header.metadata.get("clip.has_vision_encoder", False)),
        # Without a word of the file itself, the type of most tensors that are not plain f32.
        quantisation=named or (weights.most_common(1)[0][0] if weights else "F32"),
        size=sum(part.size for part in headers),
        is_all_f32=not weights,
        width=None if width is None else width * (1 + deepstack),  # `llama_hparams::n_embd_inp`
        context=header.integer(f"{architecture}.context_length"),
        projector=projector,
        projector_width=None if projector is None else _projector_width(projector, header),
        names=re.sub(r"[\s_]+", "-", "|".join(called)).lower(),
    )


def _projector_width(kind: str, header: GgufHeader) -> int | None:
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    name, dimension = PROJECTOR_TYPES.get(kind, ProjectorType()).width
    if kind == "mlp" and "mm.3.bias" in shapes:  # LLaVA of the Yi kind, which llama.cpp tells by its tensors alone
        name, dimension = "mm.3.bias", 0
    shape = shapes.get(name, ())
    if len(shape) <= dimension:
        return None
    deepstack = sum(name.startswith("v.deepstack.") and name.endswith(".fc1.weight") for name in shapes)
    return shape[dimension] * (1 + deepstack if kind == "qwen3vl_merger" else 1)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a file.

    Raises ModelNotFound when there is no such file, ModelUnreadable when it is no GGUF file, is cut short, or has more
    keys, tensors or text than any model.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ModelUnreadable(f"{path} is {kind}: give a GGUF file")
        with path.open("rb") as file:
            start = file.read(64)
            if not start.startswith(b"GGUF"):
                what = next(row["what"] for row in _FOREIGN if re.match(row["begins"].encode(), start, re.DOTALL))
                raise ModelUnreadable(f"{path} {what}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Cursor(view).header(path)
    except FileNotFoundError as error:
        raise ModelNotFound(f"there is no file {path}: check it, or see what is here with `opsin models`") from error
    except OSError as error:
        raise ModelUnreadable(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, OverflowError) as error:
        raise ModelUnreadable(f"{path} ends in the middle of its header: download it again") from error
    except _Damaged as error:
        raise ModelUnreadable(f"{path} is a damaged GGUF file (it holds {error}): download it again") from error


class _Damaged(Exception):
    """What a header holds that no model's does."""


class _Cursor:
    """Walks through one header; struct.error means that the file ends too early."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = 4

    def header(self, path: Path) -> GgufHeader:
        version = self._number(_U32)
        if version not in {2, 3}:
            found = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
            raise ModelUnreadable(f"{path} is {found}: only versions 2 and 3, little-endian, are read")
        tensor_count, key_count = self._number(_U64), self._number(_U64)
        self._check_count(key_count, MAX_KEYS, 13, "keys")
        self._check_count(tensor_count, MAX_TENSORS, 24, "tensors")
        metadata: dict[str, Scalar] = {}
        lengths: dict[str, int] = {}
        for _ in range(key_count):
            key, kind = self._string(), self._number(_U32)
            if kind == _ARRAY:
                lengths[key] = self._skip_array()
            elif kind == _STRING or kind in _SCALARS:
                metadata[key] = self._string() if kind == _STRING else self._number(kind)
            else:
                raise _Damaged(f"a value of the unknown kind {kind}")
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _Damaged(f"a data alignment of {alignment!r}")
        data = -(-self._at // alignment) * alignment
        return GgufHeader(path, len(self._view), data, metadata, lengths, tensors)

    def _number(self, kind: int) -> int:
        code = _SCALARS[kind]
        value: int = code.unpack_from(self._view, self._at)[0]
        self._at += code.size
        return value

    def _check_count(self, count: int, most: int, bytes_each: int, what: str) -> None:
        """A count that the file cannot hold is that of a cut file, one above `most` that of a damaged one."""
        if count * bytes_each > len(self._view) - self._at:
            raise struct.error
        if count > most:
            raise _Damaged(f"{count:,} {what}, and a model has {most:,} at most")

    def _string(self) -> str:
        length = self._number(_U64)
        self._check_count(length, MAX_STRING, 1, "bytes in a text")
        self._at += length
        return self._view[self._at - length : self._at].decode("utf-8", "replace")

    def _skip_array(self) -> int:
        kind, count = self._number(_U32), self._number(_U64)
        if kind in _SCALARS:
            self._at += count * _SCALARS[kind].size
        elif kind == _STRING:
            self._check_count(count, MAX_STRINGS_OF_ARRAY, 8, "texts in a list")
            view, at, read = self._view, self._at, _SCALARS[_U64].unpack_from
            for _ in range(count):  # the largest part of the work, so without calls
                at += 8 + read(view, at)[0]
            self._at = at
        else:
            raise _Damaged("an array of a kind llama.cpp does not read")
        if self._at > len(self._view):
            raise struct.error
        return count

    def _tensor(self) -> TensorHead:
        name, dimensions = self._string(), self._number(_U32)
        if dimensions > 4:
            raise _Damaged(f"the tensor {name[:64]!r} of {dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(dimensions))
        kind, offset = self._number(_U32), self._number(_U64)
        type_name, values, size = TENSOR_TYPES.get(kind, (None, 1, 0))
        return TensorHead(name, shape, type_name, offset, prod(shape) // values * size)
