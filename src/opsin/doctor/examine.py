"""The whole examination: from what is safe to what loads the pair, each step only where those before allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from opsin.core.errors import OpsinError
from opsin.core.request import ImageChunk, ImagePart
from opsin.core.settings import EngineSettings
from opsin.doctor.behaviour import behaviour_checks, drawn_image
from opsin.doctor.build import build_checks
from opsin.doctor.check import Check, worst
from opsin.doctor.pair import LoadedFacts, PairInfo, pair_checks, read_pair
from opsin.doctor.placement import placement_checks
from opsin.doctor.safety import room_checks, trial_check
from opsin.engine import Engine
from opsin.models import Pair, resolve
from opsin.native import NativeBackend, build_info, devices
from opsin.prompt import PromptBuilder, TemplateSource


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """A loaded pair; `close` frees it."""

    engine: Engine
    prompts: PromptBuilder
    backend: NativeBackend
    template: TemplateSource
    close: Callable[[], None]


def examine(
    settings: EngineSettings,
    open_pair: Callable[[EngineSettings, PairInfo], LoadedPair],
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """All checks of this machine and of the pair that the settings name, or of the default one.

    `open_pair` loads a pair whose headers were read; `tell` hears what is done now. The pair is not loaded when it does
    not fit, or when it crashed a process of its own.
    """
    build = build_info()
    built = build_checks(build, threads=settings.threads)
    yield from built
    if build.error:
        return
    headers: list[Check] = []
    try:
        info = read_pair(_pair(settings), settings)
        settings = settings.model_copy(update={"model": info.pair.llm, "mmproj": info.pair.mmproj})
        present = devices()
        facts = LoadedFacts(ubatch=settings.ubatch, settings=settings)
        headers = pair_checks(info, facts)
        safe = []
        if worst(headers) != "fail":
            safe += room_checks(info.facts, present, settings, build.cpu_features)
            yield from safe
            if worst(safe) != "fail":
                tell("trying the pair in a process of its own")
                safe.append(trial_check(info, settings))
                yield safe[-1]
        if safe and worst(safe) != "fail":
            tell("loading the model")
            loaded = open_pair(settings, info)
            try:
                headers = pair_checks(info, _loaded_facts(loaded, facts))  # which say more than before
                if worst(headers) != "fail":
                    yield from headers
                    headers = []
                    tell("asking about drawn images")
                    yield from behaviour_checks(loaded.engine, loaded.prompts)
                    tell("proving where it runs")
                    unused = next((one for one in built if one.name == "build.gpu" and one.status == "fail"), None)
                    yield from placement_checks(loaded.engine.placement(), present, settings, unused=unused)
            finally:
                loaded.close()
        yield from headers
    except OpsinError as error:
        yield from headers
        yield Check("pair.usable", "fail", f"{error}".rstrip(".") + ".", {"model": str(settings.model)})


def _pair(settings: EngineSettings) -> Pair:
    """The files. Two that are given are taken as they are: the checks of the pair judge them."""
    llm, mmproj = settings.model, settings.mmproj
    if llm is not None and mmproj is not None and llm.is_file() and mmproj.is_file():
        return Pair(llm, mmproj, name=llm.stem)
    return resolve(*(None if path is None else str(path) for path in (llm, mmproj)))


def _loaded_facts(loaded: LoadedPair, facts: LoadedFacts) -> LoadedFacts:
    backend, limits = loaded.backend, loaded.engine.limits
    facts = replace(
        facts,
        template=loaded.template,
        eog_texts=backend.eog_texts,
        ctx_seq=limits.n_ctx_seq,
        ubatch=limits.n_ubatch,
    )
    if not backend.has_vision:
        return facts
    tokenized = backend.tokenize([ImagePart(drawn_image())], add_bos=False)
    try:
        causal = all(run.causal for run in tokenized.chunks if isinstance(run, ImageChunk))
        return replace(facts, image_tokens=tokenized.n_image_tokens, causal=causal)
    finally:
        tokenized.close()
