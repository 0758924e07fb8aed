"""Settings of a server besides those of its engine: access, limits, and defaults of answers."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from opsin.core.sampling import GUARD_HELP, MAX_LOGIT_BIAS, MAX_SCHEMA, MAX_SECONDS_HELP, MAX_STOP, MAX_TOKENS_HELP
from opsin.core.settings import EngineSettings


class ServerSettings(EngineSettings):
    """One frozen value for the whole server. API keys are no part of it, so that it can be printed."""

    parallel: int = Field(8, ge=1, le=256, description="slots: how many answers are generated at the same time")

    host: str = Field("127.0.0.1", description="address to listen on; any but loopback needs an API key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any that is free")
    api_key_file: Path | None = Field(None, description="file with API keys, one a line, besides OPSIN_API_KEY's")
    served_name: str | None = Field(None, min_length=1, description="the model's name in answers (default: its file's)")
    strict_model: bool = Field(False, description="refuse requests that name another model")

    allowed_hosts: tuple[str, ...] = Field((), description="names that the Host header may have, besides loopback")
    cors_origins: tuple[str, ...] = Field((), description="origins of other web pages that may ask, as https://name")
    fetch_images: bool = Field(False, description="fetch images from http(s) addresses")
    image_hosts: tuple[str, ...] = Field((), description="hosts that images are fetched from (default: all public)")
    media_path: Path | None = Field(None, description="folder whose images may be named by file: addresses")

    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="bytes of a request")
    max_images: int = Field(16, ge=0, description="images of a request")
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
