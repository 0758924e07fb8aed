"""Rules on where the time went: answers without an end, time between tokens, batches, first pictures, slow stages.

A rule is a function from facts to a cause, or None. Thresholds stand beside their reasons; what costs little is
dropped by `report.explain`, not here.
"""

from __future__ import annotations

from statistics import median

from opsin.doctor.explain.cause import Cause
from opsin.doctor.explain.gather import Facts
from opsin.doctor.explain.request import Request
from opsin.doctor.explain.stages import between_ms, stage_table

SHORT = 64
"""Tokens of the answer with which a runaway one is compared: a sentence or two about a picture."""
_LEAST_RUNAWAY = 256
_SMALL_BATCH = 256
"""Tokens of a picture in one batch below which the batches, not the picture, set the pace."""


def runaway(facts: Facts) -> Cause | None:
    """The answer ran until the context was full, or beyond."""
    request = facts.worst
    answer, context = request.answer_n, _full_context(request)
    if not (context or request.shifts or request.truncated):
        return None
    help_ = f"set max_tokens (-n, n_predict, num_predict), for instance max_tokens={SHORT}"
    size = context or request.n_ctx
    full = f"the context of {size:,} was full" if size else "the context was full"
    if not answer:
        message = f"The answer did not end by itself: it ran until {full}."
        end = f"truncated = 1 at {request.end_tokens} tokens" if request.end_tokens else "no cell for one more token"
        sums = f"{request.shifts} context shifts" if request.shifts else end
        return Cause("runaway", "decode", None, sums, message, help_)
    generation = (request.total_ms or 0.0) if between_ms(request) else request.rest
    before, each = max(0.0, request.whole - generation), generation / answer
    short = (before + min(SHORT, answer) * each) / 1e3
    saved = max(0.0, request.whole / 1e3 - short)
    filled = f"{context - answer:,} prompt + {answer:,} answer = {context:,} tokens; " if context else ""
    sums = (
        f"{filled}{generation / 1e3:.2f} s / {answer:,} tokens = {each:.2f} ms a token; with {SHORT} tokens "
        f"{before / 1e3:.2f} + {SHORT} × {each / 1e3:.5f} = {short:.1f} s instead of {request.whole / 1e3:.2f} s"
    )
    message = f"{answer:,} tokens were generated until {full}: the answer did not end by itself."
    return Cause("runaway", "decode", saved, sums, message, f"{help_}: about {short:.1f} s", saved)


def _full_context(request: Request) -> int | None:
    """The size of the context if prompt and answer filled it; unless the log tells it, a round size is taken for it."""
    answer = request.answer_n or 0
    if answer < _LEAST_RUNAWAY:
        return None
    total = request.total_tokens or (request.prompt_tokens or request.prompt_n or 0) + answer
    if request.n_ctx is not None:
        return request.n_ctx if max(total, request.end_tokens or 0) >= request.n_ctx - 1 else None
    # A power of two comes by chance once in a thousand lengths; an answer that ended by itself says "stop".
    return total if total >= 512 and total & (total - 1) == 0 and request.finish != "stop" else None


def between_tokens(facts: Facts) -> Cause | None:
    """Time between tokens, outside llama.cpp."""
    request = facts.worst
    ms, answer = between_ms(request), request.answer_n
    if not ms or not answer:
        return None
    sums = (
        f"{request.total_ms:,.2f} total − {request.eval_ms or 0:,.2f} eval − {request.sample_ms or 0:,.2f} sample"
        f" − {request.prompt_ms or 0:,.2f} prompt = {ms:,.0f} ms, {ms / answer:.2f} ms a token"
    )
    message = f"{ms / 1e3:.1f} s were spent between tokens, outside llama.cpp: copies of logits, detokenising, Python."
    help_ = "set logits_all=False, ask for no logprobs, and use a newer llama-cpp-python, or opsin"
    return Cause("between_tokens", "all", ms / 1e3, sums, message, help_, ms / 1e3)


def before_timer(facts: Facts) -> Cause | None:
    """Most of the time lies before the timers: picture and prompt, which the timings leave out."""
    request, ms = facts.worst, facts.worst.before_timer
    if ms is None or ms < 0.5 * request.whole:
        return None
    sums = f"{request.whole / 1e3:.2f} s by the wall clock − {(request.total_ms or 0) / 1e3:.3f} s total time"
    message = f"Picture and prompt took at most {ms / 1e3:.2f} s; the timings are reset after them and leave them out."
    help_ = "look for 'CLIP using … backend' in the log of loading (verbose=True); opsin doctor proves where it runs"
    return Cause("before_timer", "encode", ms / 1e3, sums, message, help_, at_most=True)


def small_batches(facts: Facts) -> Cause | None:
    """The picture went into the language model in many small batches."""
    batches = facts.worst.batches
    size = max((batch.tokens or 0 for batch in batches), default=0)
    count = max((batch.count for batch in batches), default=0)
    if count < 3 or not 0 < size <= _SMALL_BATCH:
        return None
    ms, longest = facts.worst.decoded, max(batch.ms for batch in batches)
    seen = "" if len(batches) == count else f" ({len(batches)} of them in the log)"
    sums = f"{count} batches{seen} × {ms / count:,.0f} = {ms:,.0f} ms; one saves at most {ms:,.0f} − {longest:,.0f} ms"
    message = f"The picture was prefilled in {count} batches of {size} tokens: each reads all weights again."
    help_ = "set -b and -ub (n_batch, n_ubatch) to at least the tokens of a picture, for instance 1024"
    return Cause("small_batches", "prefill", ms / 1e3, sums, message, help_, max(0.0, ms - longest) / 1e3)


def first_image(facts: Facts) -> Cause | None:
    """The first picture cost more than those of its size that followed."""
    shown = [((r.image_tokens or r.prompt_n or 0) / len(r.encode_ms), ms) for r in facts.requests for ms in r.encode_ms]
    if not shown:
        asked = [r for r in facts.requests if r.timer == "server" and r.prompt_ms and (r.prompt_n or 0) > 1]
        shown = [(r.prompt_n or 0, r.prompt_ms or 0.0) for r in asked]
    # Larger pictures cost more; a tenth is left to the questions, whose tokens may be among them.
    encodes = [ms for size, ms in shown if abs(size - shown[0][0]) <= 0.1 * size]
    if len(encodes) < 3:
        return None
    first, usual = encodes[0], median(encodes[1:])
    extra = first - usual
    if extra < 0.25 * first or extra < 100.0 or max(encodes[1:]) > first:
        return None
    sums = f"{first:,.0f} − {usual:,.0f} ms (the median of {len(encodes) - 1} later ones) = {extra:,.0f} ms, once"
    message = f"The first picture took {first / 1e3:.2f} s, later ones {usual / 1e3:.2f} s: nothing warmed the encoder."
    help_ = "send one small picture after the start; mtmd's own warm-up computes nothing"
    return Cause("first_image", "encode", extra / 1e3, sums, message, help_, extra / 1e3)


def no_prefix_reuse(facts: Facts) -> Cause | None:
    """Prompts are computed again although they were there."""
    worst, ms = facts.worst, facts.worst.prompt_ms
    if not worst.reprocessed:
        return None
    sums = f"{worst.prompt_tokens or worst.prompt_n or 0:,} prompt tokens{'' if ms is None else f' in {ms:,.0f} ms'}"
    message = "The server threw the cached prompt away and computed it again (sliding window, recurrent memory)."
    help_ = "start llama-server with --swa-full, or with more context checkpoints (--ctx-checkpoints)"
    seconds = None if ms is None else ms / 1e3
    return Cause("no_prefix_reuse", "prefill", seconds, sums, message, help_, seconds)


def model_load(facts: Facts) -> Cause | None:
    """Loading the model takes part of a request."""
    machine, worst = facts.machine, facts.worst
    own, whole = (worst.load_ms_of_request or worst.stages.get("load", 0.0)) / 1e3, worst.whole / 1e3
    if own >= 0.3 * whole and own >= 1.0:
        sums = f"load {own:.2f} s / total {whole:.2f} s = {own / whole:.0%}"
        if worst.timer == "ollama":
            sums += "; Ollama may count the picture's encoding here"
        message = f"{own:.1f} of {whole:.1f} s went into loading, before the prompt was looked at."
        help_ = "keep the model loaded: keep_alive=-1 (OLLAMA_KEEP_ALIVE=-1), or one server for all requests"
        return Cause("model_load", "load", own, sums, message, help_, own)
    if machine.loads < 2 or facts.count < 2:
        return None
    known, cost = machine.load_s, None
    sums = f"{machine.loads} loads; the log has no times by which to tell what one takes"
    if len(known) > 1:
        cost = sum(known[1:])
        sums = " + ".join(f"{s:.2f}" for s in known[1:8]) + f" s after the first load of {known[0]:.2f} s"
    message = f"The model was loaded {machine.loads} times for {facts.count} requests."
    help_ = "load it once and keep it: one Llama object, or a server, for all requests"
    return Cause("model_load", "load", cost, sums, message, help_, cost)


def encode_slow(facts: Facts) -> Cause | None:
    """The encoder takes a second and a third of the time, and no line says why."""
    request, ms = facts.worst, facts.worst.encoded
    # A request of many pictures, or a log without requests, is slow by each of them, not by their sum.
    if ms < 1000.0 * max(1, len(request.encode_ms)) or ms < 0.3 * request.whole:
        return None
    tokens = f" for {request.image_tokens:,} tokens" if request.image_tokens else ""
    sums = f"{' + '.join(f'{x:,.0f}' for x in request.encode_ms[:6]) or f'{ms:,.0f}'} of {request.whole:,.0f} ms"
    message = f"The vision encoder took {ms / 1e3:.1f} s{tokens}: on a GPU a picture or slice is well below a second."
    help_ = "find out where it runs (opsin doctor, or 'CLIP using …' in the log); smaller pictures, fewer image tokens"
    return Cause("encode_slow", "encode", ms / 1e3, sums, message, help_, symptom=True)


def prefill_slow(facts: Facts) -> Cause | None:
    """The prompt goes in slower than 50 tokens a second."""
    request, ms = facts.worst, facts.worst.prompt_only
    tokens = max(request.prompt_n or 0, request.image_tokens or 0)
    if ms < 2000.0 or ms < 0.3 * request.whole or not tokens or tokens / ms * 1e3 >= 50.0:
        return None
    rate = tokens / ms * 1e3
    sums = f"{tokens:,} tokens / {ms / 1e3:.2f} s = {rate:.1f} token/s"
    where, help_ = ", as on a CPU", "put layers on a GPU (-ngl 99, n_gpu_layers=-1)"
    if facts.machine.on_gpu:
        where, help_ = "", "prove where picture and model run (opsin doctor)"
    if (request.prompt_n or 0) <= 1:
        sums += " (the server counted 1 token: it leaves the picture's out)"
    message = f"The prompt of {tokens:,} tokens took {ms / 1e3:.1f} s, {rate:.1f} a second{where}."
    if request.timer in {"server", "ollama"} and not request.image:
        sums += "; the time of pictures' encoder, if there were any, is in it"
    help_ += ", or take a smaller model and fewer image tokens"
    return Cause("prefill_slow", "prefill", ms / 1e3, sums, message, help_, symptom=True)


def slow_decode(facts: Facts) -> Cause | None:
    """Tokens come slower than one in half a second, or the answer is just long."""
    request = facts.worst
    ms, count = request.eval_ms or request.stages.get("decode", 0.0), request.answer_n or 0
    if ms < 5000.0 or ms < 0.3 * request.whole or count < 1:
        return None
    each = ms / count
    sums = f"{ms / 1e3:.2f} s / {count:,} tokens = {each:,.1f} ms a token, {1e3 / each:.2f} token/s"
    if each > 500.0:
        message = f"A token takes {each / 1e3:.1f} s: the model does not fit its memory, or too many threads compete."
        help_ = "close what uses memory, take a smaller quantisation, and as many threads as physical cores"
        return Cause("decode_starved", "decode", ms / 1e3, sums, message, help_, symptom=True)
    if count < 256 or ms < 0.7 * request.whole:
        return None
    saved = (count - 128) * each / 1e3
    sums += f"; 128 tokens would take {request.whole / 1e3 - saved:.1f} s in all"
    message = f"The time is the answer's length: {count:,} tokens at {1e3 / each:.1f} a second."
    help_ = "set max_tokens, or ask for a shorter answer"
    return Cause("long_answer", "decode", ms / 1e3, sums, message, help_, saved, symptom=True)


def unaccounted(facts: Facts) -> Cause | None:
    """Most of the time is in no timer."""
    request = facts.worst
    rows = {row.name: row.ms for row in stage_table(request)}
    ms = rows.get("other", 0.0)
    if ms < 2000.0 or ms < 0.5 * request.whole:
        return None
    sums = f"{request.whole:,.0f} ms in all − {sum(rows.values()) - ms:,.0f} ms in the timers = {ms:,.0f} ms"
    message = f"{ms / 1e3:.1f} of {request.whole / 1e3:.1f} s are in none of the log's timers."
    help_ = "give the whole log: the time may be loading, the vision encoder, another request, or a person's"
    return Cause("unaccounted", "all", ms / 1e3, sums, message, help_, symptom=True)


RULES = (runaway, between_tokens, before_timer, small_batches, first_image, no_prefix_reuse, model_load)
SYMPTOMS = (encode_slow, prefill_slow, slow_decode, unaccounted)
