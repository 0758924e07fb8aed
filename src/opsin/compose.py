"""Settings in, running engine out: the one file that joins `native` to `engine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.cache import DiskStore, PictureCache, default_folder
from opsin.core.settings import PROFILE_MAX_TOKENS, EngineSettings, Profile
from opsin.engine import Engine, Policy, Watch
from opsin.engine.native_calls import unwatched
from opsin.models import Pair, resolve
from opsin.native import NativeBackend, devices, open_backend
from opsin.native.parent import end_with_parent
from opsin.native.setup import setup_word
from opsin.prompt import PromptBuilder, TemplateSource

__all__ = ["Runtime", "default_profile", "end_with_parent", "gpu_names", "open_runtime", "template_source"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """An engine with its model loaded, and what writes prompts for that model.

    `setup` names files, settings, library and machine in one word: what was proved for it holds for it. `backend`
    is the engine's, for measurements while it is idle; None where an engine was made of something else. `template` is
    what the prompts are written by.
    """

    engine: Engine
    prompts: PromptBuilder
    is_demo: bool
    setup: str
    backend: NativeBackend | None = None
    template: TemplateSource | None = None

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
    watch: Watch = unwatched,
    resolved: Callable[[Path, Path | None], None] = lambda *_: None,
) -> Runtime:
    """Find the pair, load it, and make ready to ask; `template` stands in for the model's own chat template.

    `max_queue` requests may wait. `watch` is told of native calls; `resolved` of the pair's files, before they are
    loaded.

    Raises ModelError when the pair cannot be used, BadParameter when a setting does not fit this machine.
    """
    pair = resolve(None if model is None else str(model), None if mmproj is None else str(mmproj))
    resolved(pair.llm, pair.mmproj)
    profile = settings.profile or default_profile()
    settings = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj, "profile": profile})
    opened: list[NativeBackend] = []

    def open_native() -> NativeBackend:
        opened.append(open_backend(settings))
        return opened[0]

    store = DiskStore(default_folder(), settings.disk_cache_bytes) if settings.disk_cache else None
    engine = Engine(
        open_native,
        policy=_policy(settings, max_queue),
        pictures=PictureCache(settings.picture_cache_bytes, store),
        max_tokens=PROFILE_MAX_TOKENS[profile],
        watch=watch,
    )
    try:
        source = template_source(opened[0], pair)
        source = source if template is None else replace(source, template=template)
        prompts = PromptBuilder(source)
        setup = setup_word([pair.llm, pair.mmproj], settings, devices())
    except BaseException:
        engine.close()
        raise
    return Runtime(engine, prompts, pair.is_demo, setup, opened[0], source)


def _policy(settings: EngineSettings, max_queue: int) -> Policy:
    return Policy(
        parallel=settings.parallel,
        max_queue=max_queue,
        slice_seconds=settings.slice_seconds,
        turn_share=settings.turn_share,
        longest_turn=settings.longest_turn,
    )


def gpu_names() -> tuple[str, ...]:
    """The GPUs that this build computes on, as ggml names them."""
    return tuple(device.name for device in devices() if device.is_gpu)


def default_profile() -> Profile:
    """Throughput where there is a CUDA device, interactive on Apple silicon and CPUs."""
    return "throughput" if any(device.name.startswith("CUDA") for device in devices()) else "interactive"


def template_source(backend: NativeBackend, pair: Pair) -> TemplateSource:
    """What the prompt room needs to know of a loaded pair."""
    metadata, info = backend.metadata, backend.info
    heads = int(metadata.get(f"{info.architecture}.attention.head_count", "1") or 1)
    kv_heads = int(metadata.get(f"{info.architecture}.attention.head_count_kv", str(heads)) or heads)
    return TemplateSource(
        template=backend.chat_template,
        architecture=info.architecture,
        name=f"{info.name} {pair.llm.name}",
        projector=info.projector,
        bos_token=backend.bos_text,
        eos_token=backend.eos_text,
        control_tokens=frozenset(backend.control_texts),
        kv_groups=max(1, heads // max(1, kv_heads)),
    )
