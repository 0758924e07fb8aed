"""The whole examination: from what is safe to what loads the pair, each step only where those before allow it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from opsin.bench.cost import read_cost
from opsin.core.errors import ModelError, OpsinError, PairMismatch
from opsin.core.layout import ImageRun
from opsin.core.parts import PicturePart
from opsin.core.placement import Placement
from opsin.core.sampling import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.doctor.behaviour import behaviour_checks, drawn_picture
from opsin.doctor.build import build_checks, gpu_backends
from opsin.doctor.check import Check, means_cpu, worst
from opsin.doctor.pair import LoadedFacts, PairInfo, pair_checks, read_pair
from opsin.doctor.placement import Rates, placement_checks
from opsin.doctor.room import room_checks
from opsin.doctor.trial import trial_check
from opsin.engine import Engine
from opsin.models import Pair, resolve
from opsin.native import NativeBackend, build_info, devices
from opsin.native.device_rate import measure_device
from opsin.native.threads import default_threads
from opsin.prompt import Message, PromptBuilder, TemplateSource

_DECODED = 48  # tokens of the answers that are timed
_TIMED = 3  # answers, of which the fastest counts


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
    open_pair: Callable[[EngineSettings], LoadedPair],
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """All checks of this machine and of the pair that the settings name, or of the default one.

    `open_pair` loads a pair of files; `tell` hears what is done now. What a failed check would make unsafe or senseless
    is left out: the pair is not loaded when it does not fit, or when it ended a process of its own.
    """
    build = build_info()
    built = build_checks(build, threads=settings.threads)
    yield from built
    if build.error:
        return
    headers: list[Check] = []
    try:
        pair = _pair(settings)
        settings = settings.model_copy(update={"model": pair.llm, "mmproj": pair.mmproj})
        tell("reading the files' headers")
        info = read_pair(pair, settings)
        headers = pair_checks(info, _facts(settings))
        if worst(headers) != "fail" and (yield from _can_be_loaded(info, settings, build.cpu_features, tell)):
            tell("loading the model")
            unused = next((check for check in built if check.name == "build.gpu" and check.status == "fail"), None)
            for check in _loaded(info, open_pair(settings), settings, tell, unused):
                headers = []  # the loaded pair tells all of them, and better
                yield check
        yield from headers
    except OpsinError as error:
        yield from headers
        yield Check("pair.usable", "fail", f"{error}".rstrip(".") + ".", {"model": str(settings.model)})


def _pair(settings: EngineSettings) -> Pair:
    """The files; two that do not belong together as well, since the checks say it with what fixes it."""
    llm, mmproj = settings.model, settings.mmproj
    try:
        return resolve(*(None if path is None else str(path) for path in (llm, mmproj)))
    except PairMismatch:
        if llm is None or mmproj is None or not (llm.is_file() and mmproj.is_file()):
            raise
        return Pair(llm, mmproj, name=llm.stem)


def _can_be_loaded(
    info: PairInfo, settings: EngineSettings, cpu_features: frozenset[str], tell: Callable[[str], None]
) -> Generator[Check, None, bool]:
    room = room_checks(info.facts, devices(), settings, cpu_features)
    yield from room
    if worst(room) == "fail":
        return False
    tell("trying the pair in a process of its own")
    trial = trial_check(info, settings)
    yield trial
    return trial.status != "fail"


def _facts(settings: EngineSettings) -> LoadedFacts:
    on_cpu = means_cpu(settings.mmproj_device) or not gpu_backends()
    return LoadedFacts(ubatch=settings.ubatch, on_cpu=on_cpu, settings=settings)


def _loaded(
    info: PairInfo, subject: LoadedPair, settings: EngineSettings, tell: Callable[[str], None], unused: Check | None
) -> Iterator[Check]:
    """What the loaded pair tells, up to what makes asking it senseless; `unused` as in placement_checks."""
    try:
        checks = pair_checks(info, _loaded_facts(subject, _facts(settings)))
        yield from checks
        if worst(checks) == "fail":
            return
        tell("asking about drawn images")
        yield from behaviour_checks(subject.engine, subject.prompts)  # first, while no image was seen
        tell("proving where it runs")
        placement = subject.engine.placement()
        rates = _rates(info, subject, settings, placement)
        yield from placement_checks(placement, devices(), settings, rates=rates, unused=unused)
    finally:
        subject.close()


def _loaded_facts(subject: LoadedPair, facts: LoadedFacts) -> LoadedFacts:
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
    layout = backend.layout([PicturePart(drawn_picture())], add_bos=False)
    try:
        runs = [run for run in layout.runs if isinstance(run, ImageRun)]
        return replace(facts, image_tokens=layout.n_image_tokens, causal=all(run.causal for run in runs))
    finally:
        layout.close()


def _rates(info: PairInfo, subject: LoadedPair, settings: EngineSettings, placement: Placement) -> Rates:
    """The fastest of some timed answers about new images, and what the devices that took part can give."""
    params = SamplingParams(temperature=0.0, max_tokens=_DECODED, ignore_eos=True, guard=False)
    encode, decode = [], []
    for _ in range(_TIMED):
        picture = [drawn_picture()] if info.mmproj is not None else []
        prompt = subject.prompts.build([Message("user", [*picture, "What is this?"])])
        answer = subject.engine.submit(prompt, params).result()
        encode.append(answer.stages.encode_ms / 1e3)
        decode.append(answer.timings.predicted_per_token_ms / 1e3)
    cost = read_cost(info.llm.path, info.mmproj.path if info.mmproj else None, settings.kv_type)
    threads = settings.threads_batch or settings.threads or default_threads(int(cost.weights + cost.head))
    ceilings = {}
    for device in devices():
        if device.name in {*placement.encoder, *placement.language_model}:
            with suppress(ModelError):  # one that is full, or that one program at a time may use
                ceilings[device.name] = measure_device(device, threads)
    return Rates(ceilings, cost.encode_ops, min(encode), cost.weight_bytes, min(decode))
