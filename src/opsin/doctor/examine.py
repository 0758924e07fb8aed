"""The whole examination: from what is safe to what loads the pair, each step only where those before allow it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from opsin.bench.cost import read_cost
from opsin.bench.pictures import picture_file
from opsin.core.errors import ModelError, PairMismatch
from opsin.core.layout import ImageRun
from opsin.core.parts import PicturePart
from opsin.core.picture import Picture
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings, MediaSettings
from opsin.doctor.behaviour import behaviour_checks
from opsin.doctor.build import build_checks, gpu_backends
from opsin.doctor.check import Check, worst
from opsin.doctor.pair import PairFacts, pair_checks
from opsin.doctor.placement import Rates, placement_checks
from opsin.doctor.room import estimate_room, room_checks
from opsin.doctor.safety import safety_check
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.models import GgufInfo, Pair, read_info, resolve
from opsin.native import NativeBackend, build_info, devices
from opsin.native.device_rate import measure_device
from opsin.native.threads import default_threads
from opsin.prompt import Message, PromptBuilder, TemplateSource

_DECODED = 48  # tokens of the answers that are timed
_TIMED = 3  # answers, of which the fastest counts


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded pair; `close` frees it."""

    engine: Engine
    prompts: PromptBuilder
    backend: NativeBackend
    template: TemplateSource
    close: Callable[[], None]


def examine(
    settings: EngineSettings,
    open_pair: Callable[[EngineSettings], Subject],
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """All checks of this machine and of the pair that the settings name, or of the default one.

    `open_pair` loads a pair of files; `tell` hears what is done now. What a failed check would make unsafe or senseless
    is left out: the pair is not loaded when it does not fit, or when it ended a process of its own.
    """
    build = build_info()
    built = build_checks(build)
    yield from built
    if build.error:
        return
    try:
        pair = _pair(settings)
        settings = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj})
        told: set[str] = set()
        for words, look in (
            ("reading the files' headers", _headers),
            ("estimating memory", _room),
            ("trying the pair in a process of its own", _safety),
        ):
            tell(words)
            found = look(pair, settings)
            yield from found
            if worst(found) == "fail":
                return
            told |= {check.name for check in found}
        tell("loading the model")
        rebuild = next((check.fix for check in built if check.name == "build.gpu" and check.status != "ok"), None)
        for check in _loaded(pair, open_pair(settings), settings, tell, rebuild):
            if check.name not in told:
                yield check
    except ModelError as error:
        yield Check("pair.usable", "fail", f"{error}".rstrip(".") + ".", {"model": str(settings.model)})


def _pair(settings: EngineSettings) -> Pair:
    """The files; two that do not belong together as well, since the checks say it with what mends it."""
    llm, mmproj = settings.model, settings.mmproj
    try:
        return resolve(*(None if path is None else str(path) for path in (llm, mmproj)))
    except PairMismatch:
        if llm is None or mmproj is None or not (llm.is_file() and mmproj.is_file()):
            raise
        return Pair(llm, mmproj, name=llm.stem)


def _headers(pair: Pair, settings: EngineSettings) -> list[Check]:
    return pair_checks(*_infos(pair), _facts(settings))


def _room(pair: Pair, settings: EngineSettings) -> list[Check]:
    return room_checks(estimate_room(pair.llm, pair.mmproj, settings), devices())


def _safety(pair: Pair, settings: EngineSettings) -> list[Check]:
    return [safety_check(pair.llm, pair.mmproj, settings)]


def _infos(pair: Pair) -> tuple[GgufInfo, GgufInfo | None]:
    return read_info(pair.llm), None if pair.mmproj is None else read_info(pair.mmproj)


def _facts(settings: EngineSettings) -> PairFacts:
    on_cpu = settings.mmproj_device in {"none", "cpu"} or not gpu_backends()
    return PairFacts(ubatch=settings.ubatch, parallel=settings.parallel, on_cpu=on_cpu)


def _loaded(
    pair: Pair, subject: Subject, settings: EngineSettings, tell: Callable[[str], None], rebuild: str | None
) -> Iterator[Check]:
    """What the loaded pair tells; `rebuild` is the command for a GPU that this build cannot use."""
    try:
        yield from pair_checks(*_infos(pair), _loaded_facts(subject, _facts(settings)))
        tell("asking about drawn pictures")
        # First, while no picture was seen; told last, since the proof is what people look for.
        behaviour = behaviour_checks(subject.engine, subject.prompts)
        tell("proving where it runs")
        rates = _rates(pair, subject, settings)
        proof = subject.engine.placement()
        yield from placement_checks(proof, devices(), pair.llm, pair.mmproj, rates=rates, rebuild=rebuild)
        yield from behaviour
    finally:
        subject.close()


def _loaded_facts(subject: Subject, facts: PairFacts) -> PairFacts:
    backend = subject.backend
    facts = replace(
        facts,
        template=subject.template,
        eog_texts=backend.eog_texts,
        ctx_seq=subject.engine.limits.n_ctx_seq,
        ubatch=subject.engine.limits.n_ubatch,
    )
    if not backend.has_vision:
        return facts
    layout = backend.layout([PicturePart(_picture(0))], add_bos=False)
    try:
        runs = [run for run in layout.runs if isinstance(run, ImageRun)]
        return replace(facts, image_tokens=layout.n_image_tokens, causal=all(run.causal for run in runs))
    finally:
        layout.close()


def _rates(pair: Pair, subject: Subject, settings: EngineSettings) -> Rates:
    """The fastest of some timed answers about new pictures, and what the devices can give."""
    params = SamplingParams(temperature=0.0, max_tokens=_DECODED, ignore_eos=True, guard=False)
    encode, decode = [], []
    for _ in range(_TIMED):
        picture = [_picture(int.from_bytes(os.urandom(4), "big"))] if pair.mmproj is not None else []
        prompt = subject.prompts.build([Message("user", [*picture, "What is this?"])])
        answer = subject.engine.submit(prompt, params).result()
        encode.append(answer.stages.encode_ms / 1e3)
        decode.append(answer.timings.predicted_per_token_ms / 1e3)
    cost = read_cost(pair.llm, pair.mmproj, settings.kv_type)
    threads = settings.threads_batch or settings.threads or default_threads(int(cost.weights + cost.head))
    # The CPU computes whatever is not on another device, so it is measured as well.
    ceilings = {
        device.name: measure_device(device, threads) for device in devices() if device.is_gpu or device.type == "cpu"
    }
    return Rates(ceilings, cost.encode_ops, min(encode), cost.weight_bytes, min(decode))


def _picture(seed: int) -> Picture:
    return load_picture(picture_file(seed), MediaSettings())
