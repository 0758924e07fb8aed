"""A projector file in another type: large matrices are converted, everything else is copied as it is."""

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path

from opsin.core.errors import BadInput, ModelUnreadable
from opsin.core.files import replacing

ProjectorType = Literal["q8_0", "bf16"]
TYPES: tuple[ProjectorType, ...] = ("q8_0", "bf16")

# Matrices that are only ever multiplied with. Kernels, positions, norms and biases are added or read in other ways,
# for which llama.cpp wants f32 or f16; gemma3's input_projection is transposed at each encode.
_MATRIX = re.compile(r"v\.blk\.\d+\.(attn_(q|k|v|qkv|out)|ffn_(up|down|gate))\.weight|mm\.\d+\.weight")
_BLOCK = 32


def default_folder() -> Path:
    """Where converted projectors are kept."""
    return user_cache_path("opsin") / "projectors"


def convert_projector(source: Path, kind: ProjectorType, folder: Path) -> Path | None:
    """`source` with its large matrices as `kind`; None where nothing changes. Raises ModelUnreadable, BadInput."""
    import gguf

    try:
        state = source.stat()
        known = repr((str(source.resolve()), state.st_size, state.st_mtime_ns)).encode()
        reader = gguf.GGUFReader(source)
        chosen = {tensor.name for tensor in reader.tensors if _converts(tensor, kind)}
        if not chosen:
            return None
        made = folder / f"{source.stem}-{hashlib.sha256(known).hexdigest()[:12]}-{kind}.gguf"
        with replacing(made) as part:
            _write(reader, chosen, kind, part)
    except ValueError as error:
        raise ModelUnreadable(f"{source.name} cannot be converted ({error}): download it again.") from error
    except OSError as error:
        raise BadInput(f"{source.name} could not be converted in {folder}: {error.strerror or error}.") from error
    return made


def keep(made: Path) -> Path:
    """Move a conversion to where it stays. Raises BadInput."""
    target = default_folder() / made.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return made.replace(target)
    except OSError as error:
        raise BadInput(f"{target} could not be written: {error.strerror or error}.") from error


def _converts(tensor: Any, kind: ProjectorType) -> bool:
    plain = tensor.tensor_type.name in {"F32", "F16", "BF16"} - {kind.upper()} and len(tensor.shape) == 2
    return plain and int(tensor.shape[0]) % _BLOCK == 0 and _MATRIX.fullmatch(tensor.name) is not None


def _write(reader: Any, chosen: set[str], kind: ProjectorType, path: Path) -> None:
    import gguf
    from gguf.quants import dequantize, quantize

    writer = gguf.GGUFWriter(path, "clip")
    for field in reader.fields.values():
        if field.name not in {"general.architecture", "general.file_type"} and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for tensor in reader.tensors:
        data, of_type = tensor.data, tensor.tensor_type
        if tensor.name in chosen:
            wanted = gguf.GGMLQuantizationType[kind.upper()]
            data, of_type = quantize(dequantize(data, of_type), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
