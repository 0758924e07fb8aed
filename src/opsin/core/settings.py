"""Every option of an engine in one frozen value. Command line help, defaults and docs are read from here."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

KvType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]

CTX_PER_SEQUENCE = 8192
"""Context in tokens that a sequence gets where no size is given, at most."""
MAX_ANSWER_TOKENS = 1024
"""How long an answer may become where nobody says it, on every device."""
_MANY, _THREADS = 2**31 - 1, 1024

RETIRED = ("prefill_rows", "slice_seconds", "turn_share", "longest_turn", "profile")
"""Settings of earlier versions that have no effect any more: they are accepted for one version, with a warning."""
RENAMED = {
    "picture_cache_bytes": "image_cache_bytes",
    "max_pictures": "max_images",
    "max_picture_bytes": "max_image_bytes",
}
"""Settings that have a new name: the old one is accepted for one version, with a warning."""


class EngineSettings(BaseModel):
    """How a pair is loaded and run. Unknown names are refused; a value never changes after it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = Field(None, description="language model: a GGUF file, a folder, or a known name")
    mmproj: Path | None = Field(None, description="projector, a GGUF file (default: the one beside the model)")
    ctx: int | None = Field(
        None,
        ge=64,
        le=_MANY,
        description="context in tokens, shared by all slots (default: what fits, up to 8,192 each)",
    )
    gpu_layers: int | None = Field(None, ge=0, le=_MANY, description="layers on the GPU (default: all that fit)")
    device: str | None = Field(None, description="device of the language model: CUDA0, Metal, or none for the CPU")
    mmproj_device: str | None = Field(None, description="device of the vision encoder: CUDA0, Metal, or none (CPU)")
    threads: int | None = Field(
        None, ge=1, le=_THREADS, description="CPU threads for decoding (default: physical cores; 1 for tiny models)"
    )
    threads_batch: int | None = Field(
        None, ge=1, le=_THREADS, description="CPU threads for prefill (default: as for decoding)"
    )
    threads_encode: int | None = Field(
        None, ge=1, le=_THREADS, description="CPU threads for the vision encoder (default: as for prefill)"
    )
    parallel: int = Field(1, ge=1, le=256, description="slots: how many answers are generated at the same time")
    ubatch: int = Field(1024, ge=32, le=16384, description="tokens computed at once (llama.cpp's physical batch)")
    kv_type: KvType = Field("f16", description="type of the KV cache")
    flash_attention: bool | None = Field(None, description="flash attention (default: where it is supported)")
    vision_flash_attention: bool | None = Field(
        None, description="flash attention of the vision encoder (default: as flash_attention)"
    )
    image_max_tokens: int | None = Field(None, ge=1, description="most tokens of an image, if the model can choose")
    image_min_tokens: int | None = Field(None, ge=1, description="fewest tokens of an image, if the model can choose")
    image_cache_bytes: int = Field(512 * 2**20, ge=0, description="memory for embeddings of images, in bytes")
    disk_cache: bool = Field(True, description="keep embeddings of images on disk, too")
    disk_cache_bytes: int = Field(2 * 2**30, ge=0, description="disk space for embeddings of images, in bytes")
    verbose: bool = Field(False, description="show llama.cpp's own log")


class ImageSettings(BaseModel):
    """Limits on images, checked before a pixel is decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(64 * 2**20, ge=1, description="bytes of an image file")
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of an image")
    max_edge: int = Field(32_768, ge=1, description="pixels of an image's longer edge")
    fetch: bool = Field(False, description="whether http(s) addresses are fetched")
    fetch_seconds: float = Field(20.0, gt=0, description="time limit of a fetch")
    fetch_redirects: int = Field(3, ge=0, le=10, description="redirects followed")


def kind_of(field: FieldInfo) -> Any:
    """The type of a field's value, None aside: `int` for `int | None`."""
    kinds = get_args(field.annotation)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else field.annotation
