"""The whole examination: from what is safe to what loads the pair, each step only where those before allow it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import PIL.Image
from PIL import ImageDraw

from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Answer
from opsin.core.errors import OpsinError
from opsin.core.request import Image, ImagePart, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.doctor.build import build_checks
from opsin.doctor.check import Check, Status, worst
from opsin.doctor.pair import PairInfo, context_check, end_check, header_checks, read_pair, ubatch_check
from opsin.doctor.placement import placement_checks
from opsin.doctor.safety import room_checks, trial_check
from opsin.engine import Engine
from opsin.images import load_image
from opsin.models import Pair, resolve
from opsin.native.devices import build_info, devices
from opsin.prompt import Message, PromptBuilder

QUESTION = "Answer in one short sentence: what is in this image?"
MAX_TOKENS = 96
"""Most tokens of an answer here: a short sentence takes a third of it."""

# What the next turn begins with in common templates; in an answer it means that the end was missed.
_TURNS = ("USER:", "ASSISTANT:", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "[INST]")
_LOOP = re.compile(r"(.+?)\1{3,}\Z", re.DOTALL)
_TAIL = 320  # characters in which a loop is looked for


def examine(
    settings: EngineSettings, tell: Callable[[str], None] = lambda _: None, *, quick: bool = False
) -> Iterator[Check]:
    """All checks of this machine and of the pair that the settings name; one that fails or does not fit is not loaded.

    `tell` hears what is done now. `quick`: none that loads the pair.
    """
    build = build_info()
    built = build_checks(build, threads=settings.threads)
    yield from built
    if build.error:
        return
    try:
        info = read_pair(_pair(settings), settings.image_max_tokens)
        settings = settings.model_copy(update={"model": info.pair.llm, "mmproj": info.pair.mmproj})
        headers, present = header_checks(info, settings), devices()
        yield from headers
        if worst(headers) == "fail":
            return
        rooms = room_checks(info.facts, present, settings, build.cpu_features)
        yield from rooms
        if quick or worst(rooms) == "fail":
            return
        tell("trying the pair in a process of its own")
        trial = trial_check(info, settings, present)
        yield trial
        if trial.status == "fail":
            return
        tell("loading the model")
        # The images drawn for it are of no use later.
        quiet, known = settings.model_copy(update={"disk_cache": False}), (info.pair, info.facts)
        with closing(open_runtime(settings.model, settings.mmproj, quiet, trial=False, known=known)) as runtime:
            loaded = _loaded_checks(info, runtime, settings)
            yield from loaded
            if worst(loaded) == "fail":
                return
            tell("asking about drawn images")
            yield from behaviour_checks(runtime.engine, runtime.prompts)
            tell("proving where it runs")
            unused = next((one for one in built if one.name == "build.gpu" and one.status == "fail"), None)
            yield from placement_checks(runtime.engine.placement(), present, settings, unused=unused)
    except OpsinError as error:
        yield Check("pair.usable", "fail", f"{error}".rstrip(".") + ".", {"model": str(settings.model)})


def _pair(settings: EngineSettings) -> Pair:
    """The files. Two that are given are taken as they are: the checks of the pair judge them."""
    llm, mmproj = settings.model, settings.mmproj
    if llm is not None and mmproj is not None and llm.is_file() and mmproj.is_file():
        return Pair(llm, mmproj, name=llm.stem)
    return resolve(llm, mmproj)


def _loaded_checks(info: PairInfo, runtime: Runtime, settings: EngineSettings) -> list[Check]:
    """The checks `pair.*` that need a loaded pair. Raises BadPrompt."""
    backend, limits = runtime.backend, runtime.engine.limits
    assert backend is not None, "a runtime of a model has one"
    with closing(backend.tokenize([ImagePart(drawn_image())], add_bos=False)) as image:
        tokens = image.n_image_tokens
    return [
        ubatch_check(tokens, limits.n_ubatch, settings),
        context_check(tokens, limits.n_ctx_seq, info.llm.context, settings),
        end_check(runtime.prompts.source, backend.eog_texts, settings),
    ]


def behaviour_checks(engine: Engine, prompts: PromptBuilder) -> list[Check]:
    """Ask the same question about two images and judge the answers. Raises EngineError and BadInput."""
    params = SamplingParams(temperature=0.0, seed=1, max_tokens=MAX_TOKENS, logprobs=20)
    built = [prompts.build([Message("user", [drawn_image(colour), QUESTION])]) for colour in ("red", "blue")]
    answers = [engine.submit(prompt, params).result() for prompt in built]
    return [_sees(answers), _ends(answers)]


def _sees(answers: Sequence[Answer]) -> Check:
    """Another image must change the probabilities of the first token at least."""
    first = [answer.logprobs[:1] for answer in answers]
    evidence = {"texts": [answer.text[:200] for answer in answers]}
    if first[0] and first[0] == first[1]:
        message = "A red and a blue square give the same answer, so the model does not see: use its own projector."
        return Check("behaviour.sees", "fail", message, evidence)
    return Check("behaviour.sees", "ok", "The answer depends on the image.", evidence)


def _ends(answers: Sequence[Answer]) -> Check:
    """An answer that was cut is a fault where it starts another turn or repeats itself; else it may just be long."""
    cut = [answer for answer in answers if answer.finish_reason == "length"]
    evidence = {"cut": len(cut), "max_tokens": MAX_TOKENS, "text": "".join(answer.text[-200:] for answer in cut[:1])}
    if not cut:
        return Check("behaviour.ends", "ok", "Answers to short questions end by themselves.", evidence)
    status: Status = "fail"
    start = f"{len(cut)} of {len(answers)} answers did not end"
    turn = next((turn for answer in cut for turn in _TURNS if turn in answer.text), None)
    if turn is not None:
        message = f"{start}: another turn follows ({turn!r} in the text); use the template published with the model."
    elif any(answer.guard is not None or _LOOP.search(answer.text[-_TAIL:]) for answer in cut):
        message = f"{start}, they repeat themselves: check that template, projector and language model match."
    else:
        status = "warn"
        message = f"{start} within {MAX_TOKENS} tokens: they may be long, else set --max-tokens (or --no-thinking)."
    return Check("behaviour.ends", status, message, evidence)


def drawn_image(colour: str = "red") -> Image:
    """A square of that colour on white."""
    image = PIL.Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(image).rectangle((180, 100, 460, 380), fill=colour)
    return load_image(image, ImageSettings())
