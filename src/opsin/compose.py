"""Settings in, running engine out: the one file that joins `native` to `engine`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from opsin.cache import DiskStore, EmbeddingCache, default_folder
from opsin.core.errors import BadParameter, OpsinError
from opsin.core.ggml_types import bytes_per_value
from opsin.core.image_options import ANY_SIZES
from opsin.core.model_info import HOST, PairFacts
from opsin.core.settings import MAX_ANSWER_TOKENS, EngineSettings
from opsin.engine import Engine, Policy, Wake, Watch, unwatched, wake_readers
from opsin.models import Pair, resolve
from opsin.models.facts import read_facts
from opsin.models.gguf import parts_of
from opsin.native import NativeBackend, open_backend
from opsin.native.devices import (
    Device,
    DeviceRate,
    cards,
    cpu_features,
    default_threads,
    devices,
    free_memory,
    measure_device,
    physical_cores,
    pick,
)
from opsin.native.memory import MemoryPlanner
from opsin.native.trial import end_with_parent, ensure_loadable, fingerprint
from opsin.prompt import PromptBuilder, TemplateSource

__all__ = ["Runtime", "end_with_parent", "gpu_names", "machine_for", "open_backend", "open_runtime", "template_source"]

DRAFT_BESIDE = 4
"""Answers at a time that get drafts, with `speculation`."""
SWAP_BYTES = 2**30
"""Main memory for prefixes that were swapped out of the KV cache, at most; no more than an eighth of what is free."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """An engine with its model loaded, and what writes prompts for that model.

    `setup` names files, settings, library and machine in one word: what was proved for it holds for it. `backend`
    is the engine's, for measurements while it is idle.
    """

    engine: Engine
    prompts: PromptBuilder
    is_demo: bool
    setup: str
    backend: NativeBackend | None = None

    def close(self) -> None:
        """Free everything; twice does no harm."""
        self.engine.close()


def open_runtime(
    model: str | Path | None,
    mmproj: str | Path | None,
    settings: EngineSettings,
    *,
    template: str | None = None,
    max_queue: int = 256,
    trial: bool = True,
    watch: Watch = unwatched,
    wake: Wake = wake_readers,
    resolved: Callable[[Path, Path | None], None] = lambda *_: None,
    progress: Callable[[float], None] = lambda _: None,
    known: tuple[Pair, PairFacts] | None = None,
) -> Runtime:
    """Find the pair, load it, and make ready to ask; `template` stands in for the model's own chat template.

    `max_queue` requests may wait. Files that were never loaded here are tried in a child process first, unless `trial`
    is False: in a process of its own a crash harms nobody. `watch` and `wake` are the engine's; `resolved` is called
    with the pair's files before they are loaded, and `progress` with how much of the language model is, from 0 to 1.
    `known` is the pair with its facts where its headers were read before.

    Raises ModelError when the pair cannot be used, BadParameter when a setting does not fit this machine.
    """
    pair = known[0] if known else resolve(model, mmproj)
    resolved(pair.llm, pair.mmproj)
    asked = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj})
    facts = known[1] if known else read_facts(pair.llm, pair.mmproj, asked.image_max_tokens)
    present = devices()
    free = free_memory(present)
    settings = MemoryPlanner(facts, present, asked, free, cpu_features()).plan().applied(asked)
    if trial and not pair.is_demo:
        ensure_loadable(pair.llm, pair.mmproj, settings)
    store = DiskStore(default_folder(), settings.disk_cache_bytes) if settings.disk_cache else None
    sizes = facts.projector.image_sizes(asked) if facts.projector else ANY_SIZES
    cell_bytes = sum(layer.kv_values for layer in facts.model.layers) * bytes_per_value(settings.kv_type)
    swap_cells = int(min(SWAP_BYTES, free.get(HOST, 0) // 8) / max(1.0, cell_bytes))
    unified = settings.kv_unified is not False
    if not unified and facts.model.slides:
        raise BadParameter("A model with a sliding window needs one KV cache for all slots: leave out --no-kv-unified.")
    policy = Policy.for_device(
        gpu=settings.gpu_layers != 0 and bool(pick(settings.device, "--device", present)),
        encoder_gpu=bool(pick(settings.mmproj_device, "--mmproj-device", present)),
        parallel=settings.parallel,
        max_queue=max_queue,
        swap_cells=swap_cells,
        unified=unified,
    )
    engine = Engine(
        lambda: open_backend(settings, progress, sizes),
        policy=replace(policy, draft_beside=DRAFT_BESIDE if settings.speculation else 0),
        images=EmbeddingCache(settings.image_cache_bytes, store),
        max_tokens=MAX_ANSWER_TOKENS,
        watch=watch,
        wake=wake,
    )
    try:
        backend = cast(NativeBackend, engine.call(lambda backend: backend))
        prompts = PromptBuilder(template_source(backend, pair, template))
        setup = fingerprint([pair.llm, pair.mmproj], asked, present)
        return Runtime(engine, prompts, pair.is_demo, setup, backend)
    except BaseException:
        engine.close()
        raise


def gpu_names() -> tuple[str, ...]:
    """The GPUs that this build computes on, as ggml names them."""
    return tuple(device.name for device in devices() if device.is_gpu)


def plan_workers(pair: Pair, settings: EngineSettings, most: int, *, apart: bool = False) -> tuple[int, EngineSettings]:
    """How many workers on the CPU half of the free memory holds, at most so many and one a core; and their settings.

    They divide a context that nobody chose, as long as a sequence may be as long as before. Rows that share nothing
    (`apart`) get a part of the KV cache for each slot, as long as it would be alone. Reads headers alone. Raises
    ModelError.
    """
    facts = read_facts(pair.llm, pair.mmproj, settings.image_max_tokens)
    free, whole = free_memory(()).get(HOST, 0), MemoryPlanner(facts, (), settings, {}).needed().ctx
    longest = min(whole, facts.model.context or whole)
    apart = apart and settings.ctx is None and settings.kv_unified is None and not facts.model.slides
    for count in range(max(1, min(most, physical_cores())), 0, -1):
        for unified in ([False] if apart else []) + ([settings.kv_unified] if count > 1 else []):
            ctx = settings.ctx or (whole if unified is False else max(longest, whole // count))
            each = settings.model_copy(update={"ctx": ctx, "kv_unified": unified})
            needs = MemoryPlanner(facts, (), each, {}).needed().by_device[HOST]
            if count * (needs.total + min(SWAP_BYTES, free // 8)) <= free // 2:
                return count, each
    return 1, settings


def machine_for(model: str, mmproj: str) -> dict[str, Any]:
    """The fields of `worker.pool.Machine` for what `--model` and `--mmproj` mean, "" for nothing.

    All is unknown for a pair or a library that cannot be used: loading says why.
    """
    try:
        pair = resolve(model or None, mmproj or None)
        llm = sum(part.stat().st_size for part in parts_of(pair.llm))
        weights = llm + (pair.mmproj.stat().st_size if pair.mmproj else 0)
        present = devices()
    except (OpsinError, OSError):
        return {}
    return {
        "gpus": [(one.name, one.memory_free) for one in cards(present)],
        "weights": weights,
        "threads": default_threads(llm // 2),  # at most two bytes a parameter
    }


def template_source(backend: NativeBackend, pair: Pair, template: str | None = None) -> TemplateSource:
    """What the prompt room needs to know of a loaded pair; `template` stands in for the model's own."""
    model, info = backend.model, backend.info
    return TemplateSource(
        template=model.chat_template if template is None else template,
        architecture=info.architecture,
        name=f"{info.name} {pair.llm.name}",
        projector=info.projector,
        bos_token=model.bos,
        eos_token=model.eos,
        control_tokens=frozenset(model.control_tokens),
        kv_groups=max(1, model.n_head // max(1, model.n_head_kv)),
    )


def main_device() -> Device:
    """The device that models go to: a GPU where there is one."""
    return min(devices(), key=lambda device: (not device.is_gpu, device.type != "cpu"))


def measured_device() -> tuple[Device, DeviceRate]:
    """That device, and the rates that it reaches. Takes a second."""
    device = main_device()
    return device, measure_device(device)
