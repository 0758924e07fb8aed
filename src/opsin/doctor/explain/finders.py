"""What a log must hold for each cause of `causes.toml`.

A finder gives nothing, or what fills the sentences of its cause, with the cost (`ms`) where it is known.
"""

from collections.abc import Callable, Mapping
from statistics import median
from types import SimpleNamespace
from typing import Any

from opsin.core.files import read_table
from opsin.doctor.explain.facts import Facts, Request

_Found = Mapping[str, Any] | None
TABLE = read_table(__file__, "causes.toml")
FLOORS: dict[str, float] = TABLE["floors"]
LIMITS = SimpleNamespace(**TABLE["limits"])


def _unsupported(facts: Facts) -> _Found:
    setup, many = facts.setup, facts.setup.splits >= LIMITS.many_splits
    if not (setup.unsupported or setup.unlisted or many):
        return None
    told = [] if setup.unsupported else ["the log does not say which"]
    told += [f"{setup.splits:,} graph splits of {setup.nodes:,} nodes: jumps between GPU and CPU"] if many else []
    told += ["it runs once for an image, so the cost should be small"] if setup.unsupported == ("IM2COL",) else []
    on = setup.device or (setup.clip if setup.clip != "CPU" else None) or "The device"
    ops = ", ".join(setup.unsupported[:6]) or "some operations"
    return {"ops": ops, "on": on, "told": f" ({'; '.join(told)})" if told else ""}


def _cpu_works(facts: Facts) -> bool:
    """No line says that all layers are on a GPU."""
    setup = facts.setup
    return setup.asked_layers < LIMITS.part if setup.layers_on is None else setup.layers_on < setup.layers


def _few_threads(facts: Facts) -> _Found:
    """Less than half of the processors (where two are a core, half of them are all cores), and the CPU works."""
    setup, request = facts.setup, facts.worst
    if not 0 < 2 * setup.threads < setup.processors or not _cpu_works(facts):
        return None
    if setup.layers_on is None and (setup.gpu or (request.timed and not _slow_model(facts))):
        return None  # a GPU may do the work
    return {"twice": 2 * setup.threads}


def _slow_model(facts: Facts) -> bool:
    """Prompt or answer are as slow as on a CPU."""
    return bool(_prefill_slow(facts) or (facts.worst.eval_ms and _decode(facts)["rate"] < 2 * LIMITS.least_decode))


def _no_vram(facts: Facts) -> _Found:
    """There is a GPU, and no layer fits it."""
    setup = facts.setup
    if not (setup.no_vram or (setup.layers_on == 0 and setup.gpu and setup.vram_need)):
        return None
    parts = {f"of {setup.layers} layers": f"{setup.layers_on}" * bool(setup.layers), "of memory": setup.vram_total}
    parts |= {"free at the start": setup.vram_start, "free at the load": setup.vram_free, "needed": setup.vram_need}
    return {"sizes": "".join(f"; {size} {what}" for what, size in parts.items() if size)}


def _prompt_cut(facts: Facts) -> _Found:
    setup, full = facts.setup, facts.worst.n_ctx == facts.setup.prompt_limit
    told = ", and the context was full with the first token of the answer" if full else ""
    return {"lost": setup.prompt_length - setup.prompt_limit, "told": told} if setup.prompt_limit else None


def _kv_full(facts: Facts) -> _Found:
    hit = [r for r in facts.requests if r.kv_full > 0]
    if lost := sum(r.image for r in hit):
        return {"ms": lost, "sums": f"{lost / 1e3:.1f} s for an image without a place"}
    return {"sums": f"{sum(r.kv_full for r in hit)} times in this log"} if hit else None


def _paging(facts: Facts) -> _Found:
    percent, elapsed = facts.setup.cpu_percent, facts.setup.elapsed_s
    if facts.setup.faults < LIMITS.many_faults or elapsed is None or percent is None:
        return None
    return {"ms": elapsed * max(0.0, 1 - percent / 100) * 1e3, "share": percent / 100}


def _runaway(facts: Facts) -> _Found:
    """The answer ran until the context was full, or beyond."""
    request = facts.worst
    answer, context = request.answer_n, _full_context(request)
    if not (context or request.shifts or request.truncated):
        return None
    if facts.setup.prompt_limit and not answer and request.shifts < LIMITS.same_answers:
        return None  # a prompt that was cut to the size of the context fills it without any answer
    size = context or request.n_ctx
    full = f"the context of {size:,} was full" if size else "the context was full"
    few = LIMITS.short
    example = f"for instance {few}"
    if not answer:
        sums = f"{request.shifts} context shifts"
        sums += f", {request.end_tokens:,} tokens at the end" if request.end_tokens else ""
        return {"sums": sums, "told": f"The answer did not end by itself: it ran until {full}.", "instead": example}
    generation = (request.total_ms or 0.0) if request.between else request.rest
    before, each = max(0.0, request.whole - generation), generation / answer
    short = before + min(few, answer) * each
    saved = max(0.0, request.whole - short)
    filled = f"{context - answer:,} prompt + {answer:,} answer = {context:,} tokens; " if context else ""
    filled = f"{request.shifts} context shifts; " if request.shifts else filled
    sums = (
        f"{filled}{generation / 1e3:.2f} s / {answer:,} tokens = {each:.2f} ms a token; with {few} tokens "
        f"{before / 1e3:.2f} + {few} × {each / 1e3:.5f} = {short / 1e3:.1f} s instead of {request.whole / 1e3:.2f} s"
    )
    told = f"{answer:,} tokens were generated until {full}: the answer did not end by itself."
    if request.unfinished and request.shifts:
        told = f"At least {answer:,} tokens were generated, and {full} {request.shifts} times: the answer does not end."
    return {"ms": saved, "sums": sums, "told": told, "instead": f"{example}: about {short / 1e3:.1f} s"}


def _full_context(request: Request) -> int | None:
    """The size of the context if prompt and answer filled it; unless the log tells it, a round size is taken for it."""
    answer = request.answer_n
    if answer < LIMITS.least_runaway:
        return None
    total = request.total_tokens or (request.prompt_tokens or request.prompt_n or 0) + answer
    if request.n_ctx is not None:
        return request.n_ctx if max(total, request.end_tokens or 0) >= request.n_ctx - 1 else None
    # A power of two comes by chance once in a thousand lengths; an answer that ended by itself says "stop".
    return total if total >= 512 and total & (total - 1) == 0 and request.finish != "stop" else None


def _thinking(facts: Facts) -> _Found:
    """The limit of the answer came before the model had done thinking."""
    request, count = facts.worst, facts.worst.answer_n
    silent = request.thought and not request.spoke
    if request.finish != "length" or not (silent or (count and (request.reasoning_n or 0) >= 0.95 * count)):
        return None
    counted = f"{request.reasoning_n or count:,} tokens" if request.reasoning_n or count else "the whole answer"
    return {"ms": request.rest or request.stages.get("decode"), "counted": counted}


def _same_end(facts: Facts) -> _Found:
    """Answers that all have as many tokens were ended by a limit."""
    done = [r for r in facts.requests if r.answer_n and not r.unfinished]
    count, sizes = facts.worst.answer_n, {r.answer_n for r in done}
    if len(done) < LIMITS.same_answers or sizes != {count} or count < 16 or any(r.finish == "stop" for r in done):
        return None
    # A limit is a round number, of which some timers leave the first token out; others may be the same by chance.
    round_number = any(n % 16 == 0 or n % 50 == 0 for n in (count, count + 1))
    told = round_number or all(r.finish == "length" for r in done)
    return {"answers": len(done), "count": count} if told else None


def _refused(facts: Facts) -> _Found:
    count = sum(facts.refused.values())
    codes = ", ".join(f"{n} × {code}" for code, n in sorted(facts.refused.items()))
    why = f": {facts.refusal.rstrip('.')}" if facts.refusal else ""
    return {"count": count, "codes": codes, "why": why} if count > 1 else None


def _reuse(facts: Facts) -> _Found:
    """A prompt of which a part was cached was processed from its beginning."""
    worst = facts.worst
    if worst.reprocessed and worst.prompt_ms:
        share = min(1.0, worst.reusable / worst.prompt_n) if worst.reusable and worst.prompt_n else 1.0
        kept = f"; {worst.reusable:,} of {worst.prompt_n:,} tokens were cached" if share < 1 else ""
        sums = f"the prompt took {worst.prompt_ms:,.0f} ms{kept}"
        return {"ms": share * worst.prompt_ms, "sums": sums} if worst.prompt_ms >= LIMITS.least_reprocessed_ms else None
    # A request without times may have cost as much as the one that is explained.
    others = [r for r in facts.requests if r.reprocessed and (r.prompt_ms or 1e9) >= LIMITS.least_reprocessed_ms]
    if not others:
        return None
    one = max(others, key=lambda r: r.prompt_tokens or 0)
    kept, of = (f"{n:,}" if n else "an unknown number" for n in (one.reusable, one.prompt_tokens))
    sums = f"in the request at line {one.line}, which is not the one in the table, {kept} of {of} tokens were cached"
    if one.reusable and worst.prompt_n and worst.prompt_ms:
        each = worst.prompt_ms / worst.prompt_n
        sums += f"; at {each:.2f} ms each, as in the table, they are {one.reusable * each / 1e3:.1f} s"
    return {"sums": sums}


def _between(facts: Facts) -> _Found:
    request, ms, answer = facts.worst, facts.worst.between, facts.worst.answer_n
    if not ms or not answer:
        return None
    parts = {"eval": request.eval_ms, "sample": request.sample_ms, "prompt": request.prompt_ms}
    return {"ms": ms, "each": ms / answer, **{name: part or 0.0 for name, part in parts.items()}}


def _small_batches(facts: Facts) -> _Found:
    ms, batches = facts.worst.decoded, facts.worst.batches
    size, count = max((batch.tokens or 0 for batch in batches), default=0), facts.worst.batch_count
    if count < 3 or not 0 < size <= LIMITS.small_batch:
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
    """Loads after the first. Ollama's may be of several models, or of several servers whose logs are mixed."""
    known, told = facts.setup.load_s, {"requests": facts.count}
    if len(known) < 2:
        return {"sums": f"{facts.setup.loads} loads; the log has no times by which to tell what one takes", **told}
    sums = " + ".join(f"{s:.2f}" for s in known[1:8]) + f" s after the first load of {known[0]:.2f} s"
    return {"ms": sum(known[1:]) * 1e3, "sums": sums, "about": len(known), "from": min(known), "to": max(known), **told}


def _encode_slow(facts: Facts) -> _Found:
    request = facts.worst
    # A request of many images, or a log without requests, is slow by each of them, not by their sum.
    if request.encoded < 1000.0 * max(1, len(request.encode_ms)):
        return None
    count = request.image_tokens or sum(batch.tokens or 0 for batch in request.batches)
    tokens = f" for {count:,} image tokens" if count else ""
    return {"ms": request.encoded, "tokens": tokens}


def _prefill(facts: Facts) -> dict[str, Any]:
    """The prompt's time and speed: of no tokens, if the log does not tell them."""
    request = facts.worst
    ms, tokens = request.prompt_only, max(request.prompt_n or 0, request.image_tokens or 0)
    reused = (request.prompt_tokens or 0) - tokens
    part = f" (of {request.prompt_tokens:,}: the others were reused)" if reused > 0 else ""
    rate = tokens / ms * 1e3 if ms else 0.0
    slow, good = rate < LIMITS.slow_prefill, rate >= LIMITS.good_prefill
    like = ", as on a CPU" if slow else ", which is no slow speed" if good else ""
    return {"ms": ms, "tokens": tokens, "rate": rate, "part": part, "like": like}


def _prefill_slow(facts: Facts) -> _Found:
    found = _prefill(facts)
    if not 0 < found["rate"] < (LIMITS.slow_long_prefill if found["ms"] >= 5000.0 else LIMITS.slow_prefill):
        return None
    encoder = facts.setup.vision and facts.worst.counts_encoder
    return {**found, "images": "; the time of the images' encoder, if there were any, is in it" * encoder}


def _decode(facts: Facts) -> dict[str, Any]:
    ms, count = facts.worst.eval_ms or facts.worst.stages.get("decode", 0.0), max(1, facts.worst.answer_n)
    each = ms / count
    return {"ms": ms, "count": count, "each": each, "each_s": each / 1e3, "rate": 1e3 / (each or 1.0)}


def _long(facts: Facts) -> _Found:
    found = _decode(facts)
    if found["rate"] < LIMITS.least_decode or found["count"] < LIMITS.long:
        return None
    think = facts.setup.thinking or facts.worst.thought
    found["thinks"] = ", thinking included" if think else ""
    found["help"] = ", or turn thinking off (llama-server: --reasoning-budget 0; Ollama: think=false)" if think else ""
    saved = (found["count"] - 128) * found["each"]
    return {**found, "saves": saved, "short_s": (facts.worst.whole - saved) / 1e3}


def _unaccounted(facts: Facts) -> _Found:
    ms = {row.name: row.ms for row in facts.worst.table()}.get("other", 0.0) if facts.worst.timed else 0.0
    return {"ms": ms, "timed": facts.worst.whole - ms}


FINDERS: dict[str, Callable[[Facts], Any]] = {
    "projector_parked": lambda f: f.setup.parked and {"help": TABLE["parked"].get(f.setup.parked, "free GPU memory")},
    "encoder_on_cpu": lambda f: f.setup.clip == "CPU" and f.setup.on_gpu and not f.setup.parked,
    "unsupported_ops": _unsupported,
    "flash_attention_unsupported": lambda f: f.setup.flash is False and f.setup.flash_failed,
    "no_flash_attention": lambda f: f.setup.flash is False and f.worst.encoded >= LIMITS.slow_encode_ms,
    "build_without_gpu": lambda f: f.setup.no_gpu_build,
    "no_gpu_memory": _no_vram,
    "no_device": lambda f: f.setup.no_device and not f.setup.gpu,
    "no_gpu": lambda f: f.setup.layers_on == 0,
    "cpu_share": lambda f: f.setup.cpu_share,
    "partial_offload": lambda f: 0 < (f.setup.layers_on or 0) < f.setup.layers,
    # A command line asks for a part of the layers, no line says how many there are, and the model is slow.
    "asked_layers": lambda f: 0 <= f.setup.asked_layers < LIMITS.part and f.setup.layers_on is None and _slow_model(f),
    "threads": lambda f: f.setup.threads > f.setup.processors > 0 and _cpu_works(f),
    "few_threads": _few_threads,
    "debug_build": lambda f: f.setup.debug,
    "kv_full": _kv_full,
    "out_of_memory": lambda f: f.setup.no_memory and {"short": f.setup.short_of or "The device"},
    "load_failed": lambda f: f.setup.load_failed,
    "prompt_too_long": lambda f: f.setup.too_long,
    "prompt_cut_far": lambda f: f.setup.prompt_length > LIMITS.usual_context and _prompt_cut(f),
    "prompt_cut": _prompt_cut,
    "refused": _refused,
    "paging": _paging,
    "queue": lambda f: {"ms": f.worst.stages.get("queue")},
    "runaway": _runaway,
    "thinking": _thinking,
    "low_acceptance": lambda f: (
        (n := f.worst.draft_n or 0) >= LIMITS.least_drafted
        and f.worst.draft_ok < LIMITS.few_accepted * n
        and {"accepted": f.worst.draft_ok / n}
    ),
    "same_end": _same_end,
    "between_tokens": _between,
    "before_timer": lambda f: (ms := f.worst.before_timer) and {"ms": ms, "total_s": (f.worst.total_ms or 0.0) / 1e3},
    "small_batches": _small_batches,
    "first_image": _first_image,
    "no_window_reuse": lambda f: f.setup.swa > 1 and _reuse(f),
    "no_prefix_reuse": _reuse,
    "model_load": lambda f: {"ms": f.worst.loading or f.worst.stages.get("load")},
    "model_loads": lambda f: f.tool != "Ollama" and min(f.setup.loads, f.count) >= LIMITS.several and _loads(f),
    "ollama_loads": lambda f: f.tool == "Ollama" and len(f.setup.load_s) >= LIMITS.several and _loads(f),
    "encode_slow": _encode_slow,
    "prefill_slow_on_gpu": lambda f: f.setup.on_gpu and _prefill_slow(f),
    "prefill_slow": _prefill_slow,
    "long_prompt": lambda f: (f.worst.prompt_n or 0) >= LIMITS.long_prompt and not _prefill_slow(f) and _prefill(f),
    "decode_starved": lambda f: (found := _decode(f))["each"] > LIMITS.starved_ms and found,
    "decode_slow": lambda f: LIMITS.least_decode > (found := _decode(f))["rate"] > 1e3 / LIMITS.starved_ms and found,
    "long_answer": _long,
    "unaccounted": _unaccounted,
}
