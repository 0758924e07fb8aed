"""Every option in one frozen value. Command line help, defaults and documentation are read from here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Profile = Literal["interactive", "throughput"]
KvType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]

PROFILE_MAX_TOKENS: dict[str, int] = {"interactive": 1024, "throughput": 512}
CTX_PER_SEQUENCE = 8192


class EngineSettings(BaseModel):
    """How a pair is loaded and run. Unknown names are refused; a value never changes after it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = Field(None, description="language model, a GGUF file or a known name")
    mmproj: Path | None = Field(None, description="projector, a GGUF file; found beside the model when left out")
    ctx: int | None = Field(
        None,
        ge=64,
        description="context in tokens for all answers, 64 or more; on a CPU each of the parallel ones has its share; "
        "none: what fits, at most 8,192 a sequence",
    )
    gpu_layers: int | None = Field(None, ge=0, description="layers on the GPU; none: all that fit")
    device: str | None = Field(None, description="device of the language model, as ggml names it (CUDA0, Metal, none)")
    mmproj_device: str | None = Field(None, description="device of the vision encoder (CUDA0, Metal, none for the CPU)")
    threads: int | None = Field(None, ge=1, le=1024, description="threads of decode; none: cores, one for small models")
    threads_batch: int | None = Field(None, ge=1, le=1024, description="threads of prefill; none: those of decode")
    threads_encode: int | None = Field(
        None, ge=1, le=1024, description="threads of the vision encoder; none: those of prefill, or else of decode"
    )
    parallel: int = Field(1, ge=1, le=256, description="answers at the same time")
    ubatch: int = Field(1024, ge=32, le=16384, description="tokens of a micro-batch")
    kv_type: KvType = Field("f16", description="type of the KV memory")
    flash_attention: bool | None = Field(
        None, description="flash attention; none: on where it is supported, but off on CPUs with memories of their own"
    )
    vision_flash_attention: bool | None = Field(
        None, description="flash attention of the vision encoder; none: as flash_attention, or else where supported"
    )
    prefill_rows: int | None = Field(
        None,
        ge=16,
        le=16384,
        description="tokens of a prefill step; none: 192 on CPUs with memories of their own, else ubatch",
    )
    slice_seconds: float = Field(
        0.27, ge=0.01, description="how long a prefill step may hold up streaming answers, about, in seconds"
    )
    turn_share: float = Field(
        0.05, gt=0, le=1, description="share of the time that streaming answers get while pictures are worked on, about"
    )
    longest_turn: float = Field(
        0.25,
        ge=0.03,
        description="longest wait of a stream for its next token while pictures are worked on, in seconds",
    )
    image_max_tokens: int | None = Field(None, ge=1, description="most tokens a picture, for models that can choose")
    image_min_tokens: int | None = Field(None, ge=1, description="fewest tokens a picture, for models that can choose")
    picture_cache_bytes: int = Field(512 * 2**20, ge=0, description="embeddings of pictures kept in memory, in bytes")
    disk_cache: bool = Field(True, description="keep embeddings of pictures on disk")
    disk_cache_bytes: int = Field(2 * 2**30, ge=0, description="embeddings of pictures kept on disk, in bytes")
    profile: Profile | None = Field(None, description="interactive or throughput; none: the devices decide")
    verbose: bool = Field(False, description="show llama.cpp's own log")


class MediaSettings(BaseModel):
    """Limits on pictures, checked before a pixel is decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(64 * 2**20, ge=1, description="bytes of a picture file")
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of a picture")
    max_edge: int = Field(32_768, ge=1, description="pixels of a picture's longer edge")
    fetch: bool = Field(False, description="whether http(s) addresses are fetched")
    fetch_seconds: float = Field(20.0, gt=0, description="time limit of a fetch")
    fetch_redirects: int = Field(3, ge=0, le=10, description="redirects followed")
