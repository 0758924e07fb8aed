"""Writes the two GGUF files of a pair: metadata first, then the tensors one after another."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from opsin.core.errors import BadInput, BadParameter
from opsin.models import Pair
from synth.shapes import SHAPES, PairShape, WeightType
from synth.text import llm_metadata, llm_tensors
from synth.vision import clip_metadata, clip_tensors
from synth.weights import RandomWeights, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LLM_TYPES: tuple[WeightType, ...] = ("f16", "bf16", "q8_0", "q4_0")
MMPROJ_TYPES: tuple[WeightType, ...] = ("f16", "bf16", "q8_0", "f32")

_ALIGNMENT = 32  # GGUF's default, bytes
_SPARE_BYTES = 64 * 2**20  # kept free on the disk


@dataclass(frozen=True, slots=True)
class _Plan:
    """One file to write."""

    path: Path
    arch: str
    metadata: Callable[[Any], None]
    tensors: list[Tensor]
    seed: int

    @property
    def bytes(self) -> int:
        return sum(_padded(tensor.bytes) for tensor in self.tensors)


def write_pair(
    shape: str,
    out: Path,
    *,
    quantisation: str = "q8_0",
    mmproj_type: str = "f16",
    seed: int = 0,
    template: bool = True,
    force: bool = False,
) -> Pair:
    """Write `SHAPE-TYPE.gguf` and `mmproj-SHAPE-TYPE.gguf` to the folder `out`, which is created if missing.

    The same arguments give the same bytes. Memory stays under 300 MB for any shape, and an interrupted write leaves
    nothing under the final names. Raises BadParameter for an unknown shape or type, BadInput if a file exists already
    (without `force`) or the disk is too small.
    """
    if shape not in SHAPES:
        raise BadParameter(f"there is no shape {shape!r}: choose one of {', '.join(SHAPES)}")
    return write_shape(
        SHAPES[shape],
        out,
        quantisation=_choose("language model", quantisation, LLM_TYPES),
        mmproj_type=_choose("projector", mmproj_type, MMPROJ_TYPES),
        seed=seed,
        template=template,
        force=force,
    )


def write_shape(
    shape: PairShape,
    out: Path,
    *,
    quantisation: WeightType = "q8_0",
    mmproj_type: WeightType = "f16",
    seed: int = 0,
    template: bool = True,
    force: bool = False,
) -> Pair:
    """Like `write_pair`, for a shape of your own."""
    plans = [
        _Plan(
            path=out / f"{shape.name}-{quantisation}.gguf",
            arch=shape.kind.architecture,
            metadata=lambda writer: llm_metadata(writer, shape, quantisation, template=template),
            tensors=list(llm_tensors(shape, quantisation)),
            seed=2 * seed,
        ),
        _Plan(
            path=out / f"mmproj-{shape.name}-{mmproj_type}.gguf",
            arch="clip",
            metadata=lambda writer: clip_metadata(writer, shape, mmproj_type),
            tensors=list(clip_tensors(shape, mmproj_type)),
            seed=2 * seed + 1,
        ),
    ]
    for plan in plans:
        if plan.path.exists() and not force:
            raise BadInput(f"{plan.path} is there already: use --force to write it again, or choose another folder")
    _check_room(out, sum(plan.bytes for plan in plans))
    for plan in plans:
        _write_file(plan)
    return Pair(llm=plans[0].path, mmproj=plans[1].path, name=f"{shape.name}-{quantisation}")


def _choose(what: str, name: str, types: tuple[WeightType, ...]) -> WeightType:
    for kind in types:
        if kind == name:
            return kind
    raise BadParameter(f"the {what} cannot be written as {name!r}: choose one of {', '.join(types)}")


def _check_room(out: Path, needed: int) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise BadInput(f"{out} cannot be used as a folder to write to: {error.strerror}") from error
    if free < needed + _SPARE_BYTES:
        raise BadInput(
            f"{out} has {free / 1e9:.1f} GB free and the pair needs {needed / 1e9:.1f} GB:"
            " choose another folder, a smaller --shape or a smaller --type"
        )


def _write_file(plan: _Plan) -> None:
    """Write a part file beside the final name, and rename it at the end."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    values = np.dtype(np.float32)  # shapes count in values; the last argument is the type that is written
    part = plan.path.with_name(f".{plan.path.name}.{os.getpid()}.part")
    try:
        writer = GGUFWriter(None, plan.arch)
        plan.metadata(writer)
        for tensor in plan.tensors:
            kind = GGMLQuantizationType[tensor.type.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape[::-1], values, tensor.bytes, kind)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        weights = RandomWeights(plan.seed, plan.tensors)
        with part.open("ab") as out:
            _pad(out)
            for tensor in plan.tensors:
                weights.write(tensor, out)
                _pad(out)
        part.replace(plan.path)
    except OSError as error:
        raise BadInput(f"{plan.path} could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(out: IO[bytes]) -> None:
    position = out.tell()
    out.write(bytes(_padded(position) - position))
