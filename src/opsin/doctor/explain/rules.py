"""Why a request was slow: what a log must hold for each cause of `causes.toml`, with its arithmetic.

What costs little beside the whole request is dropped by `explain`, not here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from opsin.doctor.explain.facts import Facts, Request

_Found = Mapping[str, Any] | None
SHORT = 64  # tokens of the answer with which a runaway one is compared
_LEAST_RUNAWAY = 256
_SMALL_BATCH = 256  # tokens of an image in one batch, below which the batches set the pace
_MANY_FAULTS = 10_000
_SLOW_ENCODE_MS = 500.0
_STARVED_MS = 500.0
_SLOW_PREFILL = 50.0  # tokens a second
_LONG = 256  # tokens of an answer
_TABLE = tomllib.loads(Path(__file__).with_name("causes.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause, and the seconds it costs (None: not told) by the sum in `arithmetic`; `at_most`: only bounded.

    A `symptom` names a slow stage without a reason in the log; it is left out where a cause of that stage is known.
    """

    name: str
    where: Literal["load", "encode", "prefill", "decode", "all"]
    seconds: float | None
    arithmetic: str
    message: str
    remedy: str
    saves_seconds: float | None = None
    symptom: bool = False
    at_most: bool = False


def _cause(name: str, row: Mapping[str, Any], facts: Facts) -> Cause | None:
    """The cause of one table of `causes.toml`, which says what its keys mean, where the facts hold it."""
    found, request, bound = FINDERS[name](facts), facts.worst, row.get("bound")
    if not found:
        return None
    values: dict[str, Any] = {"ms": None, "setup": facts.setup, "request": request, "whole_s": request.whole / 1e3}
    values |= found if isinstance(found, dict) else {}
    if bound:
        values["ms"], values["sums"] = _BOUNDS[bound](request)
    ms = values["ms"]
    if (ms or 0.0) < max(row.get("least_ms", 0.0), row.get("share", 0.0) * request.whole):
        return None
    values["s"] = (ms or 0.0) / 1e3
    costs = (ms, values.get("saves", ms if row.get("saves") else None))
    seconds, saves = (None if cost is None else round(cost / 1e3, 3) for cost in costs)
    return Cause(
        name=row.get("name", name),
        where=row["where"],
        seconds=seconds,
        arithmetic=values.get("sums") or row.get("sums", "").format(**values),
        message=row["message"].format(**values),
        remedy=row["remedy"].format(**values),
        saves_seconds=saves,
        symptom=row.get("symptom", False),
        at_most=bool(bound or row.get("at_most")),
    )


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


_BOUNDS = {"encoder": _encoder, "model": _model}


# ---- what the causes are found by: nothing, or what fills the sentences, with the cost (`ms`) where it is known


def _unsupported(facts: Facts) -> _Found:
    ops = ", ".join(facts.setup.unsupported[:6])
    return {"ops": ops, "on": facts.setup.clip or "The device"} if ops else None


def _threads(facts: Facts) -> bool:
    """More than there are processors, while a part of the layers is on the CPU."""
    setup = facts.setup
    return setup.threads > setup.processors and (setup.layers_on is None or setup.layers_on < setup.layers)


def _kv_full(facts: Facts) -> _Found:
    hit = [r for r in facts.requests if r.kv_full > 0]
    if lost := sum(r.image for r in hit):
        return {"ms": lost, "sums": f"{lost / 1e3:.1f} s for an image without a place"}
    return {"sums": f"{sum(r.kv_full for r in hit)} times in this log"} if hit else None


def _paging(facts: Facts) -> _Found:
    percent, elapsed = facts.setup.cpu_percent, facts.setup.elapsed_s
    if facts.setup.faults < _MANY_FAULTS or elapsed is None or percent is None:
        return None
    return {"ms": elapsed * max(0.0, 1 - percent / 100) * 1e3, "share": percent / 100}


def _runaway(facts: Facts) -> _Found:
    """The answer ran until the context was full, or beyond."""
    request = facts.worst
    answer, context = request.answer_n, _full_context(request)
    if not (context or request.shifts or request.truncated):
        return None
    size = context or request.n_ctx
    full = f"the context of {size:,} was full" if size else "the context was full"
    example = f"max_tokens={SHORT}"
    if not answer:
        sums = f"{request.shifts} context shifts, {request.end_tokens or 'unknown'} tokens at the end"
        return {"sums": sums, "told": f"The answer did not end by itself: it ran until {full}.", "instead": example}
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
    return {"ms": saved, "sums": sums, "told": told, "instead": f"{example}: about {short / 1e3:.1f} s"}


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


def _between(facts: Facts) -> _Found:
    request, ms, answer = facts.worst, facts.worst.between, facts.worst.answer_n
    if not ms or not answer:
        return None
    parts = {"eval": request.eval_ms, "sample": request.sample_ms, "prompt": request.prompt_ms}
    return {"ms": ms, "each": ms / answer, **{name: part or 0.0 for name, part in parts.items()}}


def _small_batches(facts: Facts) -> _Found:
    ms, batches = facts.worst.decoded, facts.worst.batches
    size, count = max((batch.tokens or 0 for batch in batches), default=0), facts.worst.batch_count
    if count < 3 or not 0 < size <= _SMALL_BATCH:
        return None
    longest = max(batch.ms for batch in batches)
    saves = max(0.0, ms - longest)
    return {"ms": ms, "saves": saves, "longest": longest, "count": count, "each": ms / count, "size": size}


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
    later = len(encodes) - 1
    return {"ms": extra, "first": first, "usual": usual, "first_s": first / 1e3, "usual_s": usual / 1e3, "later": later}


def _loads(facts: Facts) -> _Found:
    known, loads = facts.setup.load_s, facts.setup.loads
    if loads < 2 or facts.count < 2:
        return None
    told = {"requests": facts.count}
    if len(known) < 2:
        return {"sums": f"{loads} loads; the log has no times by which to tell what one takes", **told}
    sums = " + ".join(f"{s:.2f}" for s in known[1:8]) + f" s after the first load of {known[0]:.2f} s"
    return {"ms": sum(known[1:]) * 1e3, "sums": sums, **told}


def _encode_slow(facts: Facts) -> _Found:
    request = facts.worst
    # A request of many images, or a log without requests, is slow by each of them, not by their sum.
    if request.encoded < 1000.0 * max(1, len(request.encode_ms)):
        return None
    tokens = f" for {request.image_tokens:,} tokens" if request.image_tokens else ""
    return {"ms": request.encoded, "tokens": tokens}


def _prefill_slow(facts: Facts) -> _Found:
    request = facts.worst
    ms, tokens = request.prompt_only, max(request.prompt_n or 0, request.image_tokens or 0)
    if not ms or not tokens or (rate := tokens / ms * 1e3) >= _SLOW_PREFILL:
        return None
    images = "; the time of the images' encoder, if there were any, is in it" * request.counts_encoder
    return {"ms": ms, "tokens": tokens, "rate": rate, "images": images}


def _decode(facts: Facts) -> dict[str, Any]:
    ms, count = facts.worst.eval_ms or facts.worst.stages.get("decode", 0.0), max(1, facts.worst.answer_n)
    each = ms / count
    return {"ms": ms, "count": count, "each": each, "each_s": each / 1e3, "rate": 1e3 / (each or 1.0)}


def _long(facts: Facts) -> _Found:
    found = _decode(facts)
    if found["each"] > _STARVED_MS or found["count"] < _LONG:
        return None
    saved = (found["count"] - 128) * found["each"]
    return {**found, "saves": saved, "short_s": (facts.worst.whole - saved) / 1e3}


def _unaccounted(facts: Facts) -> _Found:
    ms = {row.name: row.ms for row in facts.worst.table()}.get("other", 0.0)
    return {"ms": ms, "timed": facts.worst.whole - ms}


FINDERS: dict[str, Callable[[Facts], Any]] = {
    "projector_parked": lambda f: f.setup.parked and {"help": _TABLE["parked"].get(f.setup.parked, "free GPU memory")},
    "encoder_on_cpu": lambda f: f.setup.clip == "CPU" and f.setup.on_gpu and not f.setup.parked,
    "unsupported_ops": _unsupported,
    "flash_attention_unsupported": lambda f: f.setup.flash is False and f.setup.flash_failed,
    "no_flash_attention": lambda f: f.setup.flash is False and f.worst.encoded >= _SLOW_ENCODE_MS,
    "build_without_gpu": lambda f: f.setup.no_gpu_build,
    "no_gpu": lambda f: f.setup.layers_on == 0,
    "partial_offload": lambda f: 0 < (f.setup.layers_on or 0) < f.setup.layers,
    "threads": _threads,
    "debug_build": lambda f: f.setup.debug,
    "kv_full": _kv_full,
    "out_of_memory": lambda f: f.setup.no_memory,
    "prompt_cut": lambda f: f.setup.prompt_limit and {"lost": f.setup.prompt_length - f.setup.prompt_limit},
    "paging": _paging,
    "queue": lambda f: {"ms": f.worst.stages.get("queue")},
    "runaway": _runaway,
    "between_tokens": _between,
    "before_timer": lambda f: (ms := f.worst.before_timer) and {"ms": ms, "total_s": (f.worst.total_ms or 0.0) / 1e3},
    "small_batches": _small_batches,
    "first_image": _first_image,
    "no_prefix_reuse": lambda f: f.worst.reprocessed and {"ms": f.worst.prompt_ms, "took": f.worst.prompt_ms or 0.0},
    "model_load": lambda f: {"ms": f.worst.loading or f.worst.stages.get("load")},
    "model_loads": _loads,
    "encode_slow": _encode_slow,
    "prefill_slow_on_gpu": lambda f: f.setup.on_gpu and _prefill_slow(f),
    "prefill_slow": _prefill_slow,
    "decode_starved": lambda f: (found := _decode(f))["each"] > _STARVED_MS and found,
    "long_answer": _long,
    "unaccounted": _unaccounted,
}


def causes_in(facts: Facts) -> Iterator[Cause]:
    """All causes that the facts hold, in the order of the table; a name is told once."""
    told = set()
    for name, row in _TABLE["causes"].items():
        if (cause := _cause(name, row, facts)) and cause.name not in told:
            told.add(cause.name)
            yield cause
