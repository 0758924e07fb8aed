"""Rules on where things run and what with: devices, operations, threads, builds, memory.

A rule is a function from facts to a cause, or None; the sum says which part of the request it touches.
"""

from __future__ import annotations

from opsin.doctor.explain.cause import Cause
from opsin.doctor.explain.gather import Facts

_MANY_FAULTS = 10_000
_PARKED = {
    "limited-vram": "free GPU memory, or use a smaller model or num_ctx: Ollama found too little",
    "partial-text-offload": "use a smaller model or num_ctx, so that all layers of the model are on the GPU",
    "shared-memory-gpu": "use Ollama before 0.30, or llama-server itself: it offloads also where memory is shared",
    "cpu-only": "leave num_gpu out: it is 0",
    "startup-oom-retry": "use a smaller model or num_ctx: the first start ran out of GPU memory",
}


def _encoder(facts: Facts) -> tuple[float | None, str]:
    """Seconds of the encoder with their sum, or a bound of them: what a fault of it costs at most."""
    request = facts.worst
    if request.encoded:
        return request.encoded / 1e3, f"{request.encoded:,.0f} ms in the encoder"
    if request.before_timer:
        return request.before_timer / 1e3, f"at most {request.before_timer:,.0f} ms before the timers"
    if request.timer in {"server", "ollama"} and request.prompt_ms:
        return request.prompt_ms / 1e3, f"at most {request.prompt_ms:,.0f} ms, the prompt's time, which holds it"
    if request.wall_ms and not request.rest:
        return request.wall_ms / 1e3, f"at most the {request.wall_ms / 1e3:,.1f} s that the request took"
    return None, "the log has no time for the encoder"


def _model(facts: Facts) -> tuple[float | None, str]:
    """Seconds of prompt and answer with their sum: what a slow device or build costs at most."""
    request = facts.worst
    ms = request.prompt_only + request.decoded + request.rest
    return (ms / 1e3, f"{ms:,.0f} ms of prompt and answer") if ms else (None, "the log has no times")


def projector_parked(facts: Facts) -> Cause | None:
    """Ollama keeps the projector on the CPU."""
    reason = facts.machine.parked
    if reason is None:
        return None
    message = f"Ollama put the vision projector on the CPU ({reason}), which its API does not tell."
    help_ = _PARKED.get(reason, "free GPU memory, or run llama-server itself")
    return Cause("projector_parked", "encode", *_encoder(facts), message, help_, at_most=True)


def encoder_on_cpu(facts: Facts) -> Cause | None:
    """The encoder is on the CPU while the language model has a GPU."""
    machine = facts.machine
    if machine.clip != "CPU" or not machine.on_gpu or machine.parked:
        return None
    message = "The vision encoder runs on the CPU ('CLIP using CPU backend') although there is a GPU."
    help_ = (
        "llama-cpp-python 0.2.58 to 0.2.73 and 0.3.6 to 0.3.8 cannot do otherwise: take 0.3.10 or newer, built with "
        "-DGGML_CUDA=on; in llama.cpp leave out --no-mmproj-offload"
    )
    return Cause("encoder_on_cpu", "encode", *_encoder(facts), message, help_, at_most=True)


def unsupported_ops(facts: Facts) -> Cause | None:
    """Operations of the encoder fall back from its device to the CPU."""
    ops, device = facts.machine.unsupported, facts.machine.clip or "The device"
    if not ops:
        return None
    message = f"{device} cannot compute {', '.join(ops[:6])} of the encoder: it falls back to the CPU."
    help_ = "take a newer llama.cpp, or another backend for this device (CUDA or ROCm instead of Vulkan)"
    return Cause("unsupported_ops", "encode", *_encoder(facts), message, help_, at_most=True)


def no_flash_attention(facts: Facts) -> Cause | None:
    """The encoder runs without flash attention."""
    machine = facts.machine
    if machine.flash is not False or (facts.worst.encoded < 500.0 and not machine.flash_failed):
        return None
    reason = "its device has none for this model" if machine.flash_failed else "it is off"
    message = f"The encoder works without flash attention ({reason}): slower, most of all for large pictures."
    help_ = "leave it on auto (--flash-attn auto; llama-cpp-python's handlers turn it off), or take a newer llama.cpp"
    return Cause("no_flash_attention", "encode", *_encoder(facts), message, help_, at_most=True)


def no_gpu(facts: Facts) -> Cause | None:
    """A GPU was asked for and none is used."""
    build, layers = facts.machine.no_gpu_build, facts.machine.layers or (1, 1)
    if not build and layers[0] > 0:
        return None
    none = f"No layer of {layers[1]} is on a GPU."
    message = "This build has no GPU backend: --gpu-layers is ignored." if build else none
    help_ = "install a build for this GPU (opsin doctor gives the command), and set -ngl 99 (n_gpu_layers=-1)"
    return Cause("no_gpu", "all", *_model(facts), message, help_, at_most=True)


def partial_offload(facts: Facts) -> Cause | None:
    """Some layers stayed on the CPU."""
    here, all_ = facts.machine.layers or (0, 0)
    if not 0 < here < all_:
        return None
    message = f"Only {here} of {all_} layers are on the GPU: every token waits for the CPU's {all_ - here}."
    help_ = "use a smaller context, quantisation or KV type (q8_0), so that all layers fit"
    if facts.tool == "Ollama":
        help_ += "; until then Ollama may keep the vision projector on the CPU, too"
    return Cause("partial_offload", "all", *_model(facts), message, help_, at_most=True)


def threads(facts: Facts) -> Cause | None:
    """More threads than the machine has, and layers for them to compute."""
    (asked, there), (here, all_) = facts.machine.threads or (0, 0), facts.machine.layers or (0, 1)
    if asked <= there or here >= all_:
        return None
    message = f"{asked} threads compete for {there} processors: each waits for the slowest at every operation."
    help_ = f"set -t (n_threads) to the number of physical cores, at most {there}"
    return Cause("threads", "all", *_model(facts), message, help_, at_most=True)


def debug_build(facts: Facts) -> Cause | None:
    """A build without optimisation."""
    if not facts.machine.debug:
        return None
    message = "This is a debug build: it computes without the compiler's optimisation, many times slower."
    help_ = "build with -DCMAKE_BUILD_TYPE=Release"
    return Cause("debug_build", "all", *_model(facts), message, help_, at_most=True)


def kv_full(facts: Facts) -> Cause | None:
    """Picture or prompt found no cells in the KV memory."""
    hit = [request for request in facts.requests if request.kv_full > 0]
    if not hit:
        return None
    lost, times = sum(request.image for request in hit) / 1e3 or None, sum(request.kv_full for request in hit)
    sums = f"{lost:.1f} s for a picture without a place" if lost else f"{times} times in this log"
    message = "The KV memory was full: picture or prompt found no cells, and what was computed for it was lost."
    help_ = "set a larger context (-c, n_ctx), or send fewer or smaller pictures in one request"
    return Cause("kv_full", "all", lost, sums, message, help_, lost)


def out_of_memory(facts: Facts) -> Cause | None:
    """The device has no memory left."""
    if not facts.machine.no_memory:
        return None
    sums = f"{facts.machine.no_memory} times in this log"
    help_ = "use fewer layers on the GPU, a smaller context, or a smaller picture"
    return Cause("out_of_memory", "all", None, sums, "The device ran out of memory.", help_)


def prompt_cut(facts: Facts) -> Cause | None:
    """Ollama threw the beginning of the prompt away."""
    limit, length = facts.machine.cut_prompt or (0, 0)
    if not length:
        return None
    message = f"The prompt of {length:,} tokens was cut to {limit:,}: the model did not see all of it."
    sums = f"{length:,} − {limit:,} = {length - limit:,} tokens lost"
    return Cause("prompt_cut", "prefill", None, sums, message, f"set num_ctx to more than {length:,}")


def paging(facts: Facts) -> Cause | None:
    """The process waited for pages of the model from the disk (GNU time -v)."""
    faults, share, elapsed = facts.machine.faults or 0, facts.machine.cpu_share, facts.machine.elapsed_s
    if faults < _MANY_FAULTS or elapsed is None or share is None:
        return None
    waited = elapsed * max(0.0, 1 - share)
    sums = f"{elapsed:,.0f} s × (1 − {share:.2f} of a core) = {waited:,.0f} s of waiting, at least"
    message = f"{faults:,} pages were read from disk while it ran: the model does not fit the free memory."
    help_ = "free memory or take a smaller quantisation; --no-mmap tells at the start that it does not fit"
    return Cause("paging", "all", waited, sums, message, help_, waited)


def queue(facts: Facts) -> Cause | None:
    """The request waited for others (Opsin's own account)."""
    ms, whole = facts.worst.stages.get("queue", 0.0), facts.worst.whole
    if ms < 0.3 * whole or ms < 500.0:
        return None
    sums, message = f"queue {ms:,.0f} ms of {whole:,.0f} ms", f"The request waited {ms / 1e3:.1f} s for others."
    return Cause("queue", "all", ms / 1e3, sums, message, "serve more at once (--parallel), or send less")


_PLACES = (projector_parked, encoder_on_cpu, unsupported_ops, no_flash_attention, no_gpu, partial_offload)
RULES = (*_PLACES, threads, debug_build, kv_full, out_of_memory, prompt_cut, paging, queue)
