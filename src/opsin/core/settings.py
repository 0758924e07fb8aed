"""Every option of an engine and of a server. Command line help, defaults and docs are read from here."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

KvType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]

CTX_PER_SEQUENCE = 8192
"""Context in tokens that a sequence gets where no size is given, at most."""
MAX_ANSWER_TOKENS = 1024
"""How long an answer may become where nobody says it, on every device."""
MAX_STOP, MAX_LOGIT_BIAS, MAX_SCHEMA = 64, 65_536, 2**20
"""Bounds on numbers of stop strings and biased tokens, and on characters of a schema; servers set lower limits."""
MAX_TOKENS_HELP = f"longest answer in tokens (default: {MAX_ANSWER_TOKENS:,})"
MAX_SECONDS_HELP = "longest time for an answer in seconds, waiting included"
GUARD_HELP = "end answers that repeat themselves without end"
_MANY, _THREADS = 2**31 - 1, 1024
MAX_PAGES, MOST_PAGES = 20, 200  # of a document: read unless somebody says more, and asked for at most
_RANGE = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)

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
    kv_unified: bool | None = Field(
        None, description="one KV cache for all slots, which shares prefixes (default: yes; batch: if images repeat)"
    )
    swa_full: bool = Field(
        True, description="keep all that a model with a sliding window has seen, so that prompts are remembered"
    )
    kv_type: KvType = Field("f16", description="type of the KV cache")
    flash_attention: bool | None = Field(None, description="flash attention (default: where it is supported)")
    vision_flash_attention: bool | None = Field(
        None, description="flash attention of the vision encoder (default: as flash_attention)"
    )
    speculation: bool = Field(
        False, description="decode several guessed tokens at once where answers repeat earlier ones"
    )
    device_sampling: bool = Field(
        False, description="choose tokens on the GPU, with llama.cpp's experimental backend sampling"
    )
    image_max_tokens: int | None = Field(None, ge=1, description="most tokens of an image, if the model can choose")
    image_min_tokens: int | None = Field(None, ge=1, description="fewest tokens of an image, if the model can choose")
    image_cache_bytes: int = Field(512 * 2**20, ge=0, description="memory for embeddings of images, in bytes")
    disk_cache: bool = Field(True, description="keep embeddings of images on disk, too")
    disk_cache_bytes: int = Field(2 * 2**30, ge=0, description="disk space for embeddings of images, in bytes")
    verbose: bool = Field(False, description="show llama.cpp's own log")


def page_ranges(text: str) -> list[tuple[int, int | None]]:
    """First and last page of each range of a text as `1-3,7,9-` (None: to the end). Raises ValueError."""
    found = [_RANGE.fullmatch(one.strip()) for one in text.split(",")]
    ranges = [(int(one[1]), int(one[3]) if one[3] else None if one[2] else int(one[1])) for one in found if one]
    if len(ranges) < len(found) or not all(1 <= first <= (last or first) for first, last in ranges):
        raise ValueError("not a list of pages: write it as 3, 1-3, 2,5-7 or 4-")
    return ranges


PageList = Annotated[str, Field(max_length=1000), AfterValidator(lambda text: page_ranges(text) and text)]


class ImageSettings(BaseModel):
    """Limits on images, checked before a pixel is decoded, and which pages of documents are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(64 * 2**20, ge=1, description="bytes of an image file")
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of an image")
    max_edge: int = Field(32_768, ge=1, description="pixels of an image's longer edge")
    fetch: bool = Field(False, description="whether http(s) addresses are fetched")
    fetch_seconds: float = Field(20.0, gt=0, description="time limit of a fetch")
    fetch_redirects: int = Field(3, ge=0, le=10, description="redirects followed")
    pages: PageList | None = Field(
        None, description="pages of documents, as 1-3,7 (default: all up to --max-pages; the first of a TIFF)"
    )
    max_pages: int = Field(MAX_PAGES, ge=1, le=MOST_PAGES, description="most pages of a document")

    def chosen(self) -> dict[str, Any]:
        """What is said of pages, where it is not the default."""
        return self.model_dump(include={"pages", "max_pages"}, exclude_defaults=True)


class VideoSettings(BaseModel):
    """Which frames of a video are read, and limits that are checked before one is decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fps: float = Field(1.0, gt=0, le=1000, description="frames read of each second of a video")
    max_frames: int = Field(16, ge=1, le=256, description="most frames of a video; of more, some are taken evenly")
    max_bytes: int = Field(2**30, ge=1, description="bytes of a video file")
    max_seconds: float = Field(4 * 3600.0, gt=0, description="length of a video")


class ServerSettings(EngineSettings):
    """One frozen value for the whole server. API keys are no part of it, so that it can be printed."""

    parallel: int = Field(8, ge=1, le=256, description="slots: how many answers are generated at the same time")

    workers: int | None = Field(
        None, ge=1, le=64, description="processes with the model (default: one for each GPU that it fits on, or one)"
    )
    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs an API key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any that is free")
    api_key_file: Path | None = Field(None, description="file with API keys, one a line, besides OPSIN_API_KEY's")
    served_name: str | None = Field(None, min_length=1, description="the model's name in answers (default: its file's)")
    strict_model: bool = Field(False, description="refuse requests that name another model")
    strict_fields: bool = Field(False, description="refuse requests with fields that have no effect")

    root_path: str = Field("", description="path that a proxy puts before all addresses, as /opsin")
    trusted_proxies: tuple[str, ...] = Field(
        ("127.0.0.1", "::1"), description="addresses or networks whose X-Forwarded-For and -Proto count"
    )
    allowed_hosts: tuple[str, ...] = Field((), description="names that the Host header may have, besides loopback")
    cors_origins: tuple[str, ...] = Field((), description="origins of other web pages that may ask, as https://name")
    fetch_images: bool = Field(False, description="fetch images from http(s) addresses")
    image_hosts: tuple[str, ...] = Field((), description="hosts that images are fetched from (default: all public)")
    media_path: Path | None = Field(None, description="folder whose images may be named by file: addresses")

    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="bytes of a request")
    max_images: int = Field(16, ge=0, description="images of a request, a document counted as one")
    max_pages: int = Field(MAX_PAGES, ge=1, le=MOST_PAGES, description="pages of a request's documents")
    max_frames: int = Field(32, ge=1, le=256, description="frames of a request's videos")
    max_image_bytes: int = Field(32 * 2**20, ge=1, description="bytes of an image file")
    max_pixels: int = Field(100_000_000, ge=1, description="pixels of an image")
    max_pixels_in_flight: int = Field(200_000_000, ge=1, description="pixels decoded at the same time; more wait")
    max_prompt_chars: int = Field(1_000_000, ge=1, description="characters of a request's text")
    max_queue: int = Field(256, ge=1, description="requests that may wait; more get 429")
    max_n: int = Field(8, ge=1, le=64, description="choices of a request (n)")
    max_stop: int = Field(16, ge=0, le=MAX_STOP, description="stop strings of a request")
    max_logit_bias: int = Field(300, ge=0, le=MAX_LOGIT_BIAS, description="tokens with a logit bias in a request")
    max_top_logprobs: int = Field(20, ge=0, le=20, description="alternatives shown for each token (top_logprobs)")
    max_schema_bytes: int = Field(64 * 2**10, ge=64, le=MAX_SCHEMA, description="bytes of a JSON schema or grammar")
    requests_per_minute: int | None = Field(None, ge=1, description="requests a minute for each key (default: any)")
    concurrent_requests: int | None = Field(None, ge=1, description="requests at once for each key (default: any)")
    batch_store: str | None = Field(
        None, description="database of files and batches, as postgresql://HOST/NAME (default: a file; none: no batches)"
    )
    max_file_bytes: int = Field(200 * 2**20, ge=1, description="bytes of a file that is uploaded for a batch")
    max_stored_bytes: int = Field(8 * 2**30, ge=1, description="bytes of all files of a key")
    max_batch_rows: int = Field(50_000, ge=1, description="requests of a batch")
    keep_days: int = Field(30, ge=1, le=3650, description="days that files and ended batches are kept")
    slow_reader_seconds: float = Field(30.0, gt=0, description="close a connection after so long without progress")

    max_tokens: int | None = Field(None, ge=1, description=MAX_TOKENS_HELP)
    max_seconds: float | None = Field(None, gt=0, description=MAX_SECONDS_HELP)
    guard: bool = Field(True, description=GUARD_HELP)

    drain_seconds: float = Field(30.0, ge=0, description="seconds that running answers may go on after SIGTERM")
    idle_unload_seconds: float | None = Field(
        None, gt=0, description="unload the model after this many seconds without requests"
    )

    otel: bool = Field(False, description="send OpenTelemetry traces (opsin[otel]; OTEL_* variables say where)")
    log_json: bool = Field(False, description="one JSON object a request in the log")


def kind_of(field: FieldInfo) -> Any:
    """The type of a field's value, None aside: `int` for `int | None`."""
    kinds = get_args(field.annotation)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else field.annotation


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings by name as the words of a command."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words
