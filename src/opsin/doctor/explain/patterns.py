"""Which line tells which fact: one table of patterns.

The strings are those of llama.cpp (`llama_print_timings`, `llama_perf_context_print`, the server's `print_timings`,
`mtmd-helper.cpp`, the old `clip.cpp` and `llava.cpp`), of llama-cpp-python's handlers and scripts around them, of
Ollama, and of GNU `time -v`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
SERVER_CLOCK = re.compile(r"(?<!\S)(\d{1,9})\.(\d\d\.\d{3})\.(\d{3}) [A-Z] ")
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

_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,20})?"
_ASKS = "(?:api/(?:chat|generate)|v1/(?:chat/)?completions)"
_GPU = r"CUDA\d|ROCm\d|Vulkan\d|SYCL\d|Metal|MTL\d|CANN\d|OpenCL"
How = Literal["setup", "put", "once", "event", "closing"]

# How the values are kept (a method of `parse._Reader` or of its book), a part that each such line has, the pattern
# ("" for the part alone), and what the line says without a value. {name} is a number: the field of Setup or Request.
# fmt: off
_ROWS: tuple[tuple[How, str, str, Mapping[str, Any]], ...] = (
    ("setup", "layers to GPU", "offloaded {layers_on}/{layers} layers to GPU", {}),
    ("setup", "layers.offload", r"layers\.model={layers} layers\.offload={layers_on}", {}),
    ("setup", "CLIP using", r"CLIP using (?P<clip>\w+) backend", {}),
    ("setup", "buffer size", rf"\b(?:{_GPU})\s+(?:\w+ )?buffer size", {"gpu": True}),
    ("setup", "library=", r"library=(?i:CUDA|ROCm|Vulkan|Metal)\b", {"gpu": True}),
    ("setup", "loaded ", r"loaded (?:CUDA|ROCm|HIP|Vulkan|SYCL) backend", {"gpu": True}),
    ("setup", "not compiled with GPU offload support", "", {"no_gpu_build": True}),
    ("setup", "flash attention", r"flash attention (?:is )?disabled", {"flash": False}),
    ("setup", "flash attention", r"flash attention (?:is )?not supported", {"flash": False, "flash_failed": True}),
    ("setup", "flash attention is enabled", "", {"flash": True}),
    ("setup", "-f", r"--?(?:flash-attn|fa) (?:off|0)\b", {"flash": False}),
    ("setup", "n_threads = ", r"n_threads = {threads}(?: \(n_threads_batch = \d+\))? / {processors}", {}),
    ("setup", "warning: ", r"warning: (?:asserts enabled|debug build)", {"debug": True}),
    ("setup", "build: ", r"^build: .* \(debug\)", {"debug": True}),
    ("setup", "[unoptimized", "", {"debug": True}),
    ("setup", "out of memory", "", {"no_memory": 1}),
    ("setup", "alloc", r"(?:failed to allocate (?:buffer|compute|CUDA)|unable to allocate)", {"no_memory": 1}),
    ("setup", "projector offload", r'disabling multimodal projector offload"? reason=(?P<parked>[\w-]+)', {}),
    ("setup", "truncating", 'truncating input prompt"? limit={prompt_limit} prompt={prompt_length}', {}),
    ("setup", "page faults", r"Major \(requiring I/O\) page faults: {faults}", {}),
    ("setup", "of CPU", "Percent of CPU this job got: {cpu_percent}%", {}),
    ("setup", "Elapsed (wall", r"time \([^)]*\): (?P<elapsed_s>(?:\d{1,9}:){1,2}\d{1,9}(?:\.\d{1,9})?)", {}),
    ("once", "n_tokens = ", r"task\.n_tokens = {prompt_tokens}", {}),
    ("once", "n_prompt_tokens = ", "n_prompt_tokens = {prompt_tokens}", {}),
    ("once", "stop proc", "stop processing: n_(?:tokens|past) = {end_tokens}, truncated = (?:0|(?P<truncated>1))", {}),
    # Not a prompt that found no cells, but an answer that ran out of them, token by token.
    ("once", "memory slot for batch", "memory slot for batch of size 1$", {"truncated": True}),
    ("once", "forcing full prompt re-processing", "", {"reprocessed": True}),
    ("event", "context shift,", "", {"shifts": 1}),
    ("event", "failed to find", r"find (?:a memory|KV cache) slot for u?batch of size (?!1\b)", {"kv_full": 1}),
    ("event", "could not find a KV slot", "", {"kv_full": 1}),
    ("event", "retrying with smaller", "", {"kv_full": -1}),
    ("event", " in ", r"(?:image slice|image|mtmd batch) (?:encoded|encoding done) in\s+{encode_ms} ms", {}),
    ("event", "image embedding", "image embedding created: {image_tokens} tokens", {}),
    ("event", "image_tokens->nx", "image_tokens->nx = {image_tokens}", {}),
    ("put", "image processed in", "image processed in {processed_ms} ms", {}),
    ("put", "duration:", r"^total duration:\s+(?P<total_ms>\S+)", {"timer": "ollama"}),
    ("put", "duration:", r"^load duration:\s+(?P<load_ms>\S+)", {"timer": "ollama"}),
    ("put", "duration:", r"^prompt eval duration:\s+(?P<prompt_ms>\S+)", {"timer": "ollama"}),
    ("put", "duration:", r"^eval duration:\s+(?P<eval_ms>\S+)", {"timer": "ollama"}),
    ("put", "eval count:", r"^prompt eval count:\s+{prompt_n}", {}),
    ("put", "eval count:", r"^eval count:\s+{eval_n}", {}),
    ("closing", "[GIN]", rf"\|\s*\d{{3}}\s*\|\s*(?P<wall_ms>\S+)\s*\|.*/{_ASKS}", {"timer": "ollama"}),
)
# fmt: on


class Line(NamedTuple):
    """A row of the table."""

    how: How
    part: str
    pattern: re.Pattern[str]
    told: Mapping[str, Any]


def _compiled(pattern: str) -> re.Pattern[str]:
    def group(name: re.Match[str]) -> str:
        return f"(?P<{name[1]}>{_NUMBER if name[1].endswith('_ms') else r'[0-9]{1,9}'})"

    return re.compile(re.sub(r"\{([a-z_]+)\}", group, pattern))


LINES = tuple(Line(how, part, _compiled(pattern), told) for how, part, pattern, told in _ROWS)


def values_of(found: re.Match[str], told: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a line tells: times as floats, other numbers as integers, words as they are."""
    return {**told, **{name: _value(name, text) for name, text in found.groupdict().items() if text is not None}}


def _value(name: str, text: str) -> Any:
    if name == "encode_ms":
        return (float(text),)
    if name.endswith("_ms"):
        return float(text) if text[-1].isdigit() else go_duration(text)
    if name.endswith("_s"):  # h:mm:ss or m:ss
        return reduce(lambda total, part: 60 * total + float(part), text.split(":"), 0.0)
    return int(text) if text.isdecimal() else text


_COUNT = r"(\d{1,9})"
UNSUPPORTED = re.compile(r":\s+([A-Z][A-Z0-9_]+): type = ")
LOADING = re.compile(r"(?:llama_model_loader: loaded meta data|load_model: loading model|loading model via)[^,]*")
VOCABULARY = re.compile(r"vocab_only\s*= 1\b")
STARTED = re.compile(r"runner started in (\d{1,9}(?:\.\d{1,9})?) seconds")
BEGUN = re.compile(r"model loaded|add_text|encoding |launch_slot|Llama\.generate|eval time")
TASK = re.compile(rf"\| task {_COUNT} \|")
TIMER = re.compile(rf"(load|sampl(?:e|ing)|prompt eval|eval|total) time\s*=\s*({_NUMBER}) ms(?:\s*/\s*{_COUNT})?")
TIMERS = {
    "load": "load",
    "prompt eval": "prompt",
    "eval": "eval",
    "sample": "sample",
    "sampling": "sample",
    "total": "total",
}
"""llama.cpp's timers: how the fields of a request are called for their time and their count."""
BATCH_SIZE = re.compile(rf"decoding image batch {_COUNT}/{_COUNT}, n_tokens_batch = {_COUNT}")
BATCH = re.compile(rf"image decoded \(batch {_COUNT}/{_COUNT}\) in ({_NUMBER}) ms")
CTX = re.compile(rf"n_ctx_slot\s*=\s*{_COUNT}|n_ctx\s+= {_COUNT}|--ctx-size {_COUNT}|\bn_ctx={_COUNT}")
WALL = re.compile(
    rf"(?:\b(?:cost|took|elapsed)|time is)\s{{0,9}}[:=]?\s{{0,9}}(\d{{1,3}}(?:,\d{{3}})+(?:\.\d{{1,9}})?|{_NUMBER})"
    rf"\s?(?:s|sec|seconds)(?![\w/])|time is:({_NUMBER})$"
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
COUNTS = {name: name for name in ("prompt_n", "prompt_tokens", "completion_tokens", "total_tokens", "image_tokens")}
COUNTS |= {"predicted_n": "eval_n", "prompt_eval_count": "prompt_n", "eval_count": "eval_n"}
ACCESS = re.compile(r" tokens=(\d{1,9})\+(\d{1,9}) .*?total=(\d{1,9}(?:\.\d{1,9})?)s(.*)$")
ACCESS_FIELD = re.compile(r"(\w+)=(\d{1,9}(?:\.\d{1,9})?)s\b|\bend=(\w+)")
_GO = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(h|ms|m|µs|us|μs|ns|s)")
_GO_MS = {"h": 3.6e6, "m": 6e4, "s": 1e3, "ms": 1.0, "µs": 1e-3, "μs": 1e-3, "us": 1e-3, "ns": 1e-6}


def go_duration(text: str) -> float | None:
    """Milliseconds of a duration as Go prints it ("1m2.5s", "78.93µs"); None if it is none."""
    parts = _GO.findall(text)
    return sum(float(number) * _GO_MS[unit] for number, unit in parts) if parts else None
