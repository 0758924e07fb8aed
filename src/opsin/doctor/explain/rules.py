"""Why a request was slow: one row a cause, with its thresholds, its arithmetic, and what helps.

A new case is a new row. What costs little beside the whole request is dropped by `explain`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from opsin.doctor.explain.facts import Facts, Request, Setup

Where = Literal["load", "encode", "prefill", "decode", "all"]
_Found = Mapping[str, Any] | None
SHORT = 64  # tokens of the answer with which a runaway one is compared
_LEAST_RUNAWAY = 256
_SMALL_BATCH = 256  # tokens of an image in one batch, below which the batches set the pace
_MANY_FAULTS = 10_000
_STARVED_MS = 500.0
_SLOW_PREFILL = 50.0  # tokens a second
_LONG = 256  # tokens of an answer


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause, and the seconds it costs (None: not told) by the sum in `arithmetic`; `at_most`: only bounded.

    A `symptom` names a slow stage without a reason in the log; it is left out where a cause of that stage is known.
    """

    name: str
    where: Where
    seconds: float | None
    arithmetic: str
    message: str
    remedy: str
    saves_seconds: float | None = None
    symptom: bool = False
    at_most: bool = False

    def as_dict(self) -> dict[str, Any]:
        """A row of `opsin explain --json`: plain values, seconds rounded to milliseconds."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. `find` looks at facts, setup and slowest request, and gives nothing or what fills the sentences.

    It also gives `ms`, `sums` and `saves` (ms), or `cost` gives a bound. The cause counts from `least_ms` and `share`.
    """

    name: str
    where: Where
    find: Callable[[Facts, Setup, Request], Any]
    message: str
    remedy: str
    cost: Callable[[Request], tuple[float | None, str]] | None = None
    least_ms: float = 0.0
    share: float = 0.0
    symptom: bool = False
    at_most: bool = False

    def apply(self, facts: Facts) -> Cause | None:
        """The cause, where the facts hold it."""
        found, whole = self.find(facts, facts.setup, facts.worst), facts.worst.whole
        if not isinstance(found, dict):
            return None
        ms, sums = self.cost(facts.worst) if self.cost else (found.get("ms"), str(found["sums"]))
        if (ms or 0.0) < max(self.least_ms, self.share * whole):
            return None
        values = {"s": (ms or 0.0) / 1e3, "whole_s": whole / 1e3, **found}
        message, remedy = self.message.format(**values), self.remedy.format(**values)
        seconds, saves = (None if x is None else x / 1e3 for x in (ms, found.get("saves")))
        at_most = self.at_most or self.cost is not None
        return Cause(self.name, self.where, seconds, sums, message, remedy, saves, self.symptom, at_most)


def _encoder(request: Request) -> tuple[float | None, str]:
    """Milliseconds of the encoder with their sum, or a bound of them."""
    if request.encoded:
        return request.encoded, f"{request.encoded:,.0f} ms in the encoder"
    if request.before_timer:
        return request.before_timer, f"at most {request.before_timer:,.0f} ms before the timers"
    if request.timer in {"server", "ollama"} and request.prompt_ms:
        return request.prompt_ms, f"at most {request.prompt_ms:,.0f} ms, the prompt's time, which holds it"
    if request.wall_ms and not request.rest:
        return request.wall_ms, f"at most the {request.wall_ms / 1e3:,.1f} s that the request took"
    return None, "the log has no time for the encoder"


def _model(request: Request) -> tuple[float | None, str]:
    """Milliseconds of prompt and answer with their sum."""
    ms = request.prompt_only + request.decoded + request.rest
    return (ms, f"{ms:,.0f} ms of prompt and answer") if ms else (None, "the log has no times")


# ---- what the rows look for


def _no_flash(setup: Setup, request: Request) -> _Found:
    if setup.flash is not False or (request.encoded < 500.0 and not setup.flash_failed):
        return None
    return {"reason": "its device has none for this model" if setup.flash_failed else "it is off"}


def _no_gpu(setup: Setup) -> _Found:
    if setup.no_gpu_build:
        return {"told": "This build has no GPU backend: --gpu-layers is ignored."}
    return {"told": f"No layer of {setup.layers} is on a GPU."} if setup.layers_on == 0 else None


def _kv_full(facts: Facts) -> _Found:
    hit = [r for r in facts.requests if r.kv_full > 0]
    lost = sum(r.image for r in hit) or None
    times = f"{sum(r.kv_full for r in hit)} times in this log"
    sums = f"{lost / 1e3:.1f} s for an image without a place" if lost else times
    return {"ms": lost, "sums": sums, "saves": lost} if hit else None


def _paging(setup: Setup) -> _Found:
    faults, percent, elapsed = setup.faults, setup.cpu_percent, setup.elapsed_s
    if faults < _MANY_FAULTS or elapsed is None or percent is None:
        return None
    share = percent / 100
    waited = elapsed * max(0.0, 1 - share) * 1e3
    sums = f"{elapsed:,.0f} s × (1 − {share:.2f} of a core) = {waited / 1e3:,.0f} s of waiting, at least"
    return {"ms": waited, "sums": sums, "saves": waited, "faults": faults}


def _runaway(request: Request) -> _Found:
    """The answer ran until the context was full, or beyond."""
    answer, context = request.answer_n, _full_context(request)
    if not (context or request.shifts or request.truncated):
        return None
    size = context or request.n_ctx
    full = f"the context of {size:,} was full" if size else "the context was full"
    if not answer:
        sums = f"{request.shifts} context shifts, {request.end_tokens or 'unknown'} tokens at the end"
        return {"sums": sums, "told": f"The answer did not end by itself: it ran until {full}.", "about": ""}
    generation = (request.total_ms or 0.0) if request.between else request.rest
    before, each = max(0.0, request.whole - generation), generation / answer
    short = before + min(SHORT, answer) * each
    saved = max(0.0, request.whole - short)
    filled = f"{context - answer:,} prompt + {answer:,} answer = {context:,} tokens; " if context else ""
    sums = (
        f"{filled}{generation / 1e3:.2f} s / {answer:,} tokens = {each:.2f} ms a token; with {SHORT} tokens "
        f"{before / 1e3:.2f} + {SHORT} × {each / 1e3:.5f} = {short / 1e3:.1f} s instead of {request.whole / 1e3:.2f} s"
    )
    told = f"{answer:,} tokens were generated until {full}: the answer did not end by itself."
    return {"ms": saved, "sums": sums, "saves": saved, "told": told, "about": f": about {short / 1e3:.1f} s"}


def _full_context(request: Request) -> int | None:
    """The size of the context if prompt and answer filled it; unless the log tells it, a round size is taken for it."""
    answer = request.answer_n
    if answer < _LEAST_RUNAWAY:
        return None
    total = request.total_tokens or (request.prompt_tokens or request.prompt_n or 0) + answer
    if request.n_ctx is not None:
        return request.n_ctx if max(total, request.end_tokens or 0) >= request.n_ctx - 1 else None
    # A power of two comes by chance once in a thousand lengths; an answer that ended by itself says "stop".
    return total if total >= 512 and total & (total - 1) == 0 and request.finish != "stop" else None


def _between(request: Request) -> _Found:
    ms, answer = request.between, request.answer_n
    if not ms or not answer:
        return None
    sums = (
        f"{request.total_ms:,.2f} total − {request.eval_ms or 0:,.2f} eval − {request.sample_ms or 0:,.2f} sample"
        f" − {request.prompt_ms or 0:,.2f} prompt = {ms:,.0f} ms, {ms / answer:.2f} ms a token"
    )
    return {"ms": ms, "sums": sums, "saves": ms}


def _small_batches(request: Request) -> _Found:
    ms, size = request.decoded, max((batch.tokens or 0 for batch in request.batches), default=0)
    count = max((batch.of for batch in request.batches), default=0)
    if count < 3 or not 0 < size <= _SMALL_BATCH:
        return None
    longest = max(batch.ms for batch in request.batches)
    sums = f"{count} batches × {ms / count:,.0f} = {ms:,.0f} ms; one saves at most {ms:,.0f} − {longest:,.0f} ms"
    return {"ms": ms, "sums": sums, "saves": max(0.0, ms - longest), "count": count, "size": size}


def _first_image(facts: Facts) -> _Found:
    """The first image cost more than those of its size that followed."""
    shown = [((r.image_tokens or r.prompt_n or 0) / len(r.encode_ms), ms) for r in facts.requests for ms in r.encode_ms]
    if not shown:
        asked = [r for r in facts.requests if r.timer == "server" and r.prompt_ms and (r.prompt_n or 0) > 1]
        shown = [(r.prompt_n or 0, r.prompt_ms or 0.0) for r in asked]
    # Larger images cost more; a tenth is left to the questions, whose tokens may be among them.
    encodes = [ms for size, ms in shown if abs(size - shown[0][0]) <= 0.1 * size]
    if len(encodes) < 3:
        return None
    first, usual = encodes[0], median(encodes[1:])
    extra = first - usual
    if extra < max(0.25 * first, 100.0) or max(encodes[1:]) > first:
        return None
    sums = f"{first:,.0f} − {usual:,.0f} ms (the median of {len(encodes) - 1} later ones) = {extra:,.0f} ms, once"
    return {"ms": extra, "sums": sums, "saves": extra, "first": first / 1e3, "usual": usual / 1e3}


def _load_of_request(request: Request) -> _Found:
    own = request.loading or request.stages.get("load", 0.0)
    sums = f"load {own / 1e3:.2f} s of {request.whole / 1e3:.2f} s (Ollama may count an image's encoding here)"
    return {"ms": own, "sums": sums, "saves": own} if own else None


def _loads(facts: Facts, setup: Setup) -> _Found:
    known, loads = setup.load_s, setup.loads
    if loads < 2 or facts.count < 2:
        return None
    told = {"loads": loads, "requests": facts.count}
    if len(known) < 2:
        return {"sums": f"{loads} loads; the log has no times by which to tell what one takes", **told}
    cost = sum(known[1:]) * 1e3
    sums = " + ".join(f"{s:.2f}" for s in known[1:8]) + f" s after the first load of {known[0]:.2f} s"
    return {"ms": cost, "sums": sums, "saves": cost, **told}


def _encode_slow(request: Request) -> _Found:
    ms = request.encoded
    # A request of many images, or a log without requests, is slow by each of them, not by their sum.
    if ms < 1000.0 * max(1, len(request.encode_ms)):
        return None
    tokens = f" for {request.image_tokens:,} tokens" if request.image_tokens else ""
    return {"ms": ms, "sums": f"{ms:,.0f} of {request.whole:,.0f} ms", "tokens": tokens}


def _prefill_slow(setup: Setup, request: Request) -> _Found:
    ms, tokens = request.prompt_only, max(request.prompt_n or 0, request.image_tokens or 0)
    if not ms or not tokens or (rate := tokens / ms * 1e3) >= _SLOW_PREFILL:
        return None
    with_images = "; the time of the images' encoder, if there were any, is in it" * request.counts_encoder
    sums = f"{tokens:,} tokens / {ms / 1e3:.2f} s = {rate:.1f} token/s{with_images}"
    where, help_ = ", as on a CPU", "put layers on a GPU (-ngl 99, n_gpu_layers=-1)"
    if setup.on_gpu:
        where, help_ = "", "prove where image and model run (opsin doctor)"
    return {"ms": ms, "sums": sums, "tokens": tokens, "rate": rate, "place": where, "help": help_}


def _decode(request: Request) -> dict[str, Any]:
    ms, count = request.eval_ms or request.stages.get("decode", 0.0), max(1, request.answer_n)
    each = ms / count
    sums = f"{ms / 1e3:.2f} s / {count:,} tokens = {each:,.1f} ms a token"
    return {"ms": ms, "sums": sums, "count": count, "each": each, "each_s": each / 1e3, "rate": 1e3 / (each or 1.0)}


def _long(request: Request) -> _Found:
    found = _decode(request)
    if found["each"] > _STARVED_MS or found["count"] < _LONG:
        return None
    saved = (found["count"] - 128) * found["each"]
    sums = f"{found['sums']}; 128 tokens would take {(request.whole - saved) / 1e3:.1f} s in all"
    return {**found, "sums": sums, "saves": saved}


_PARKED = {
    "limited-vram": "free GPU memory, or use a smaller model or num_ctx: Ollama found too little",
    "partial-text-offload": "use a smaller model or num_ctx, so that all layers of the model are on the GPU",
    "shared-memory-gpu": "use Ollama before 0.30, or llama-server itself: it offloads also where memory is shared",
    "cpu-only": "leave num_gpu out: it is 0",
    "startup-oom-retry": "use a smaller model or num_ctx: the first start ran out of GPU memory",
}

# fmt: off
RULES = (
    # Where things run, and what with.
    Rule("projector_parked", "encode",
         lambda _f, s, _r: s.parked and {"reason": s.parked, "help": _PARKED.get(s.parked, "free GPU memory")},
         "Ollama put the vision projector on the CPU ({reason}), which its API does not tell.", "{help}", _encoder),
    Rule("encoder_on_cpu", "encode", lambda _f, s, _r: {} if s.clip == "CPU" and s.on_gpu and not s.parked else None,
         "The vision encoder runs on the CPU ('CLIP using CPU backend') although there is a GPU.",
         "llama-cpp-python 0.2.58 to 0.2.73 and 0.3.6 to 0.3.8 cannot do otherwise: take 0.3.10 or newer, built with "
         "-DGGML_CUDA=on; in llama.cpp leave out --no-mmproj-offload", _encoder),
    Rule("unsupported_ops", "encode",
         lambda _f, s, _r: s.unsupported and {"ops": ", ".join(s.unsupported[:6]), "on": s.clip or "The device"},
         "{on} cannot compute {ops} of the encoder: it falls back to the CPU.",
         "take a newer llama.cpp, or another backend for this device (CUDA or ROCm instead of Vulkan)", _encoder),
    Rule("no_flash_attention", "encode", lambda _f, s, r: _no_flash(s, r),
         "The encoder works without flash attention ({reason}): slower, most of all for large images.",
         "leave it on auto (--flash-attn auto; llama-cpp-python's handlers turn it off), or update it", _encoder),
    Rule("no_gpu", "all", lambda _f, s, _r: _no_gpu(s), "{told}",
         "install a build for this GPU (opsin doctor gives the command), and set -ngl 99 (n_gpu_layers=-1)", _model),
    Rule("partial_offload", "all",
         lambda _f, s, _r: 0 < (s.layers_on or 0) < s.layers and {"here": s.layers_on, "all": s.layers},
         "Only {here} of {all} layers are on the GPU: every token waits for the CPU.",
         "use a smaller context, quantisation or KV type (q8_0), so that all layers fit; until then Ollama may keep "
         "the vision projector on the CPU, too", _model),
    Rule("threads", "all",
         lambda _f, s, _r: s.threads > s.processors and (s.layers_on is None or s.layers_on < s.layers)
         and {"asked": s.threads, "there": s.processors},
         "{asked} threads compete for {there} processors: each waits for the slowest at every operation.",
         "set -t (n_threads) to the number of physical cores, at most {there}", _model),
    Rule("debug_build", "all", lambda _f, s, _r: {} if s.debug else None,
         "This is a debug build: it computes without the compiler's optimisation, many times slower.",
         "build with -DCMAKE_BUILD_TYPE=Release", _model),
    Rule("kv_full", "all", lambda f, _s, _r: _kv_full(f),
         "The KV cache was full: image or prompt found no cells, and what was computed for it was lost.",
         "set a larger context (-c, n_ctx), or send fewer or smaller images in one request"),
    Rule("out_of_memory", "all", lambda _f, s, _r: s.no_memory and {"sums": f"{s.no_memory} times in this log"},
         "The device ran out of memory.", "use fewer layers on the GPU, a smaller context, or a smaller image"),
    Rule("prompt_cut", "prefill",
         lambda _f, s, _r: s.prompt_limit and {
             "limit": s.prompt_limit, "length": s.prompt_length, "sums": f"{s.prompt_length:,} − {s.prompt_limit:,} = "
             f"{s.prompt_length - s.prompt_limit:,} tokens lost"},
         "The prompt of {length:,} tokens was cut to {limit:,}: the model did not see all of it.",
         "set num_ctx to more than {length:,}"),
    Rule("paging", "all", lambda _f, s, _r: _paging(s),
         "{faults:,} pages were read from disk while it ran: the model does not fit the free memory.",
         "free memory or take a smaller quantisation; --no-mmap tells at the start that it does not fit"),
    Rule("queue", "all", lambda _f, _s, r: (q := r.stages.get("queue")) and {"ms": q, "sums": f"{q:,.0f} ms of queue"},
         "The request waited {s:.1f} s for others.", "serve more at once (--parallel), or send less",
         least_ms=500.0, share=0.3),
    # Where the time went.
    Rule("runaway", "decode", lambda _f, _s, r: _runaway(r), "{told}",
         f"set max_tokens (-n, n_predict, num_predict), for instance max_tokens={SHORT}{{about}}"),
    Rule("between_tokens", "all", lambda _f, _s, r: _between(r),
         "{s:.1f} s were spent between tokens, outside llama.cpp: copies of logits, detokenising, Python.",
         "set logits_all=False, ask for no logprobs, and use a newer llama-cpp-python, or opsin"),
    Rule("before_timer", "encode",
         lambda _f, _s, r: r.before_timer and {
             "ms": r.before_timer,
             "sums": f"{r.whole / 1e3:.2f} s by the wall clock − {(r.total_ms or 0) / 1e3:.3f} s total time"},
         "Image and prompt took at most {s:.2f} s; the timings are reset after them and leave them out.",
         "look for 'CLIP using … backend' in the log of loading (verbose=True); opsin doctor proves where it runs",
         share=0.5, at_most=True),
    Rule("small_batches", "prefill", lambda _f, _s, r: _small_batches(r),
         "The image was prefilled in {count} batches of {size} tokens: each reads all weights again.",
         "set -b and -ub (n_batch, n_ubatch) to at least the tokens of an image, for instance 1024"),
    Rule("first_image", "encode", lambda f, _s, _r: _first_image(f),
         "The first image took {first:.2f} s, later ones {usual:.2f} s: nothing warmed the encoder.",
         "send one small image after the start; mtmd's own warm-up computes nothing"),
    Rule("no_prefix_reuse", "prefill",
         lambda _f, _s, r: r.reprocessed and {"ms": r.prompt_ms, "saves": r.prompt_ms,
                                              "sums": f"the prompt took {r.prompt_ms or 0:,.0f} ms"},
         "The server threw the cached prompt away and computed it again (sliding window, recurrent memory).",
         "start llama-server with --swa-full, or with more context checkpoints (--ctx-checkpoints)"),
    Rule("model_load", "load", lambda _f, _s, r: _load_of_request(r),
         "{s:.1f} of {whole_s:.1f} s went into loading, before the prompt was looked at.",
         "keep the model loaded: keep_alive=-1 (OLLAMA_KEEP_ALIVE=-1), or one server for all requests",
         least_ms=1000.0, share=0.3),
    Rule("model_load", "load", lambda f, s, _r: _loads(f, s),
         "The model was loaded {loads} times for {requests} requests.",
         "load it once and keep it: one Llama object, or a server, for all requests"),
    # A stage is slow, and no line says why.
    Rule("encode_slow", "encode", lambda _f, _s, r: _encode_slow(r),
         "The vision encoder took {s:.1f} s{tokens}: on a GPU an image or slice is well below a second.",
         "find out where it runs (opsin doctor, or 'CLIP using …' in the log); smaller images, fewer image tokens",
         share=0.3, symptom=True),
    Rule("prefill_slow", "prefill", lambda _f, s, r: _prefill_slow(s, r),
         "The prompt of {tokens:,} tokens took {s:.1f} s, {rate:.1f} a second{place}.",
         "{help}, or take a smaller model and fewer image tokens", least_ms=2000.0, share=0.3, symptom=True),
    Rule("decode_starved", "decode", lambda _f, _s, r: (found := _decode(r))["each"] > _STARVED_MS and found,
         "A token takes {each_s:.1f} s: the model does not fit its memory, or too many threads compete.",
         "close what uses memory, take a smaller quantisation, and as many threads as physical cores",
         least_ms=5000.0, share=0.3, symptom=True),
    Rule("long_answer", "decode", lambda _f, _s, r: _long(r),
         "The time is the answer's length: {count:,} tokens at {rate:.1f} a second.",
         "set max_tokens, or ask for a shorter answer", least_ms=5000.0, share=0.7, symptom=True),
    Rule("unaccounted", "all",
         lambda _f, _s, r: {"ms": (ms := {row.name: row.ms for row in r.table()}.get("other", 0.0)),
                            "sums": f"{r.whole:,.0f} ms in all − {r.whole - ms:,.0f} ms in the timers = {ms:,.0f} ms"},
         "{s:.1f} of {whole_s:.1f} s are in none of the log's timers.",
         "give the whole log: the time may be loading, the vision encoder, another request, or a person's",
         least_ms=2000.0, share=0.5, symptom=True),
)
# fmt: on


def causes_in(facts: Facts) -> Iterator[Cause]:
    """All causes that the facts hold, in the order of the table; a name is told once."""
    told = set()
    for rule in RULES:
        if rule.name not in told and (cause := rule.apply(facts)):
            told.add(rule.name)
            yield cause
