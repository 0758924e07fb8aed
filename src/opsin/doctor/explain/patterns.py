"""Which line tells which fact: tables of patterns by tool.

The strings are those of llama.cpp (`llama_print_timings`, `llama_perf_context_print`, the server's `print_timings`,
`mtmd-helper.cpp`, the old `clip.cpp` and `llava.cpp`), of llama-cpp-python's handlers and scripts around them, of
Ollama, and of GNU `time -v`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
SERVER_CLOCK = re.compile(r"(?<!\S)(\d{1,9})\.(\d\d)\.(\d{3})\.(\d{3}) [A-Z] ")
DATE = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?", re.ASCII)
WORTH = re.compile(
    r"time\s*=|duration|_ms\b|_n\b|eval[ _]count|tokens|CLIP|clip|flash|offload|encod|image|batch|KV|memory|slot|n_ctx"
    r"|threads|vocab_only|loaded|loading|runner|buffer size|unsupported|type = |asserts|build|\[GIN\]|cost|took"
    r"|time is|[Ee]lapsed|page faults|of CPU|reason|Llama\.generate|chat formats|experimental CLI|truncat|total=",
)
"""Lines that may hold a fact; all others are passed over."""

TOOLS = (
    ("Opsin", re.compile(r'"image_prefill_ms"| tokens=\d{1,9}\+\d{1,9} (?:ttft|total)=')),
    ("Ollama", re.compile(r"\[GIN\]|source=\w+\.go|total_duration|^total duration:|\bollama\[")),
    ("llama-cpp-python", re.compile(r"Llama\.generate|chat formats from metadata|llama_cpp|'completion_tokens'")),
    ("llama-server", re.compile(r"\bsrv |\bslot +\w+:|llama-server|\"predicted_ms\"|print_timing: |update_slots")),
    ("llama-mtmd-cli", re.compile(r"experimental CLI|image slice encoded|clip_ctx: CLIP|alloc_compute_meta")),
    ("llava-cli", re.compile(r"encode_image_with_clip")),
)
"""Names of tools, the surest witness first: Ollama runs llama-server, and llama-server prints llama.cpp's lines."""

Value = Callable[[Sequence[str]], Any] | bool


def _numbers(groups: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(int, groups))


_GPU = r"CUDA\d|ROCm\d|Vulkan\d|SYCL\d|Metal|MTL\d|CANN\d|OpenCL"
_SETUP: tuple[tuple[str, str, Value], ...] = (
    # llama.cpp
    ("layers", r"offloaded (\d{1,9})/(\d{1,9}) layers to GPU", _numbers),
    ("clip", r"CLIP using (\w+) backend", "".join),
    ("gpu", rf"\b(?:{_GPU})\s+(?:\w+ )?buffer size|library=(?i:CUDA|ROCm|Vulkan|Metal)\b", True),
    ("gpu", r"loaded (?:CUDA|ROCm|HIP|Vulkan|SYCL) backend", True),
    ("no_gpu_build", r"not compiled with GPU offload support", True),
    ("flash_failed", r"flash attention (?:is )?not supported", True),
    ("flash", r"flash attention (?:is )?(?:not supported|disabled)|--?(?:flash-attn|fa) (?:off|0)\b", False),
    ("flash", r"flash attention is enabled", True),
    ("threads", r"n_threads = (\d{1,9})(?: \(n_threads_batch = \d+\))? / (\d{1,9})", _numbers),
    ("debug", r"warning: (?:asserts enabled|debug build)|^build: .* \(debug\)|\[unoptimized", True),
    (
        "no_memory",
        r"out of memory|failed to allocate (?:buffer|compute|CUDA)|unable to allocate|cudaMalloc failed",
        True,
    ),
    # Ollama
    ("layers", r"layers\.model=(\d{1,9}) layers\.offload=(\d{1,9})", lambda groups: _numbers(groups)[::-1]),
    ("parked", r'disabling multimodal projector offload"? reason=([\w-]+)', "".join),
    ("cut_prompt", r'truncating input prompt"? limit=(\d{1,9}) prompt=(\d{1,9})', _numbers),
    # GNU time
    ("faults", r"Major \(requiring I/O\) page faults: (\d{1,9})", lambda groups: int(groups[0])),
    ("cpu_share", r"Percent of CPU this job got: (\d{1,9})%", lambda groups: int(groups[0]) / 100),
    (
        "elapsed_s",
        r"Elapsed \(wall clock\) time \([^)]*\): (?:(\d{1,9}):)??(\d{1,9}):(\d{1,9}(?:\.\d{1,9})?)",
        lambda groups: int(groups[0] or 0) * 3600 + int(groups[1]) * 60 + float(groups[2]),
    ),
)
SETUP = tuple((name, re.compile(pattern), value) for name, pattern, value in _SETUP)
"""Fields of a Setup, the pattern of the line that tells them, and the value, which may depend on its groups."""
ANY_SETUP = re.compile("|".join(pattern for _name, pattern, _value in _SETUP))

UNSUPPORTED = re.compile(r":\s+([A-Z][A-Z0-9_]+): type = ")
LOADING = re.compile(r"(?:llama_model_loader: loaded meta data|load_model: loading model|loading model via)[^,]*")
VOCABULARY = re.compile(r"vocab_only\s*= 1\b")
STARTED = re.compile(r"runner started in (\d{1,9}(?:\.\d{1,9})?) seconds")
BEGUN = re.compile(r"model loaded|add_text|encoding |launch_slot|Llama\.generate|eval time")

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,20})?)"
_COUNT = r"(\d{1,9})"
TIMER = re.compile(rf"(load|sampl(?:e|ing)|prompt eval|eval|total) time\s*=\s*{_NUMBER} ms(?:\s*/\s*{_COUNT})?")
TIMERS = {
    "load": ("load_ms", ""),
    "prompt eval": ("prompt_ms", "prompt_n"),
    "eval": ("eval_ms", "eval_n"),
    "sample": ("sample_ms", ""),
    "sampling": ("sample_ms", ""),
    "total": ("total_ms", ""),
}
"""llama.cpp's timers: the fields of a request for their time and for their count."""
TASK = re.compile(rf"\| task {_COUNT} \|")
ENCODED = re.compile(rf"(?:image slice|image|mtmd batch) (?:encoded|encoding done) in\s+{_NUMBER} ms")
BATCH_SIZE = re.compile(rf"decoding image batch {_COUNT}/{_COUNT}, n_tokens_batch = {_COUNT}")
BATCH = re.compile(rf"image decoded \(batch {_COUNT}/{_COUNT}\) in {_NUMBER} ms")
EMBEDDING = re.compile(rf"image embedding created: {_COUNT} tokens|image_tokens->nx = {_COUNT}")
PROCESSED = re.compile(rf"image processed in {_NUMBER} ms")
STOPPED = re.compile(rf"stop processing: n_(?:tokens|past) = {_COUNT}, truncated = ([01])")
CTX = re.compile(rf"n_ctx_slot\s*=\s*{_COUNT}|n_ctx\s+= {_COUNT}|--ctx-size {_COUNT}|\bn_ctx={_COUNT}")
KV_FULL = re.compile(r"failed to find (?:a memory|KV cache) slot for u?batch of size (?!1\b)|could not find a KV slot")
PROMPT = re.compile(rf"(?:n_prompt_tokens|task\.n_tokens) = {_COUNT}")
WALL = re.compile(
    rf"(?:\b(?:cost|took|elapsed)|time is)\s{{0,9}}[:=]?\s{{0,9}}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d{{1,9}})?|{_NUMBER})"
    rf"\s?(?:s|sec|seconds)(?![\w/])|time is:{_NUMBER}$"
)

# Values of answers are found by their names, so that a pretty-printed answer, a Python dictionary and an answer inside
# another log line all serve.
PAIR = re.compile(
    r"""(?<!\\)["']([a-z_]{4,24})(?<!\\)["']\s*:\s*(?:(\d{1,18}(?:\.\d{1,18})?)|["']([^"'\\]{1,40})["'])"""
)
ENDS = frozenset({"finish_reason", "done_reason"})
TIMES = {
    "prompt_ms": ("prompt_ms", 1.0, "server"),
    "predicted_ms": ("eval_ms", 1.0, "server"),
    "total_duration": ("total_ms", 1e-6, "ollama"),
    "load_duration": ("load_ms", 1e-6, "ollama"),
    "prompt_eval_duration": ("prompt_ms", 1e-6, "ollama"),
    "eval_duration": ("eval_ms", 1e-6, "ollama"),
}
"""Times of an answer: the field of a request, milliseconds of one, and whose it is."""
COUNTS = {
    "prompt_n": "prompt_n",
    "predicted_n": "eval_n",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "total_tokens": "total_tokens",
    "image_tokens": "image_tokens",
    "prompt_eval_count": "prompt_n",
    "eval_count": "eval_n",
}
VERBOSE = re.compile(r"^((?:total|load|prompt eval|eval) duration|(?:prompt eval|eval) count):\s+(\S+)")
GIN = re.compile(r"\[GIN\].*\|\s*\d{3}\s*\|\s*(\S+)\s*\|.*/(?:api/(?:chat|generate)|v1/(?:chat/)?completions)")
GO = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(h|ms|m|µs|us|μs|ns|s)")
GO_MS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "µs": 1e-3, "μs": 1e-3, "us": 1e-3, "ns": 1e-6}
ACCESS = re.compile(r" tokens=(\d{1,9})\+(\d{1,9}) .*?total=(\d{1,9}(?:\.\d{1,9})?)s(.*)$")
ACCESS_FIELD = re.compile(r"(\w+)=(\d{1,9}(?:\.\d{1,9})?)s\b|\bend=(\w+)")
