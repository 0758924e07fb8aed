"""This machine: a slice of the pair is asked a few questions and its times are scaled; a check asks the pair itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from opsin.bench.pictures import picture_file
from opsin.core.sampling import SamplingParams
from opsin.core.settings import MediaSettings
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.models.shapes import SHAPES
from opsin.models.synth import write_pair, write_shape
from opsin.prompt import Message, PromptBuilder
from opsin.tune.history import Checked, stage_times
from opsin.tune.predict import Request, Times, scale
from opsin.tune.predict_needs import Needs, shape_needs, slice_of

QUESTION = "What is in this picture, and where is it? Tell me all about it."
ANSWER_TOKENS = 32
TURNS = 3

OpenPair = Callable[[str | None, str | None], tuple[Engine, PromptBuilder]]


def predict_here(
    needs: Needs,
    request: Request,
    open_pair: OpenPair,
    say: Callable[[str], None],
    *,
    rounds: int,
    kv_type: str,
    gpu: bool,
    checked: tuple[str | None, str | None] | None = None,
) -> tuple[Times, tuple[str, ...], Checked | None]:
    """Times, notes, and the check when the files of the pair (or its shape's name) are given.

    The slice is measured alike with a check and without: so what is checked is what is predicted every day. Slice and
    pair take turns, as both shall meet the same good and bad minutes. Raises BadInput, EngineError, OSError.
    """
    shape, llm_type, mmproj_type = slice_of(needs, gpu=gpu)
    piece = shape_needs(shape, llm_type, mmproj_type, kv_type)

    def asked(files: tuple[str | None, str | None], turn: int) -> list[Times]:
        # One question more than is counted; each has a new picture and a salt of its own, so nothing is remembered.
        engine, prompts = open_pair(*files)
        with closing(engine):
            numbers, see = range(100 * turn, 100 * turn + rounds + 1), bool(needs.cost.encode_ops)
            return [_ask(engine, prompts, number, pictures=see) for number in numbers][1:]

    slices, wholes = list[Times](), list[Times]()
    with TemporaryDirectory(prefix="opsin-predict-") as folder:
        say("writing a slice of the pair")
        part = write_shape(shape, Path(folder), quantisation=llm_type, mmproj_type=mmproj_type)
        if checked and checked[0] == needs.name and needs.name in SHAPES:
            say(f"writing {needs.name}")
            second = needs.mmproj_type or "f16"
            pair = write_pair(needs.name, Path(folder), quantisation=needs.llm_type, mmproj_type=second)
            checked = str(pair.llm), str(pair.mmproj)
        for turn in range(TURNS):
            say(f"measuring the slice, {turn + 1} of {TURNS}")
            slices += asked((str(part.llm), str(part.mmproj)), turn)
            if checked:
                say(f"measuring {needs.name}, {turn + 1} of {TURNS}")
                wholes += asked(checked, turn)
    found = middle(slices)
    pairs = [(needs.llm_type, llm_type)]
    pairs += [(needs.mmproj_type, mmproj_type)] if needs.cost.encode_ops and needs.mmproj_type else []
    notes = tuple(
        f"{kind} weights are predicted from {taken} ones, the nearest that a slice can be written with"
        for kind, taken in pairs
        if kind != taken
    )
    times = scale(found, piece, needs, request)
    if not wholes:
        return times, notes, None
    real = middle(wholes)
    # The same prompt as was measured, whatever the request is.
    counted = replace(needs, image_tokens=real.image_tokens)
    same = replace(request, text_tokens=real.text_tokens, ctx_used=0, answer_tokens=ANSWER_TOKENS)
    about = {
        "llm_type": needs.llm_type,
        "mmproj_type": needs.mmproj_type,
        "prompt_tokens": real.image_tokens + real.text_tokens,
        "slice_layers": [shape.text.layers, shape.vision.layers],
        "layers": [needs.shape.text.layers, needs.shape.vision.layers],
        "slice_runs_ms": [stage_times(run) for run in slices],
        "measured_runs_ms": [stage_times(run) for run in wholes],
    }
    predicted = stage_times(scale(found, piece, counted, same))
    return times, notes, Checked("", needs.name, predicted, stage_times(real), about)


def _ask(engine: Engine, prompts: PromptBuilder, number: int, *, pictures: bool) -> Times:
    seen = [load_picture(picture_file(number), MediaSettings())] if pictures else []
    prompt = prompts.build([Message("user", [*seen, QUESTION])])
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, guard=False)
    answer = engine.submit(prompt, params, salt=f"predict {number}").result()
    usage, stages = answer.usage, answer.stages
    return Times(
        encode_ms=stages.encode_ms,
        image_prefill_ms=stages.image_prefill_ms,
        text_prefill_ms=stages.text_prefill_ms,
        # The first token comes with the prompt.
        token_ms=(stages.decode_ms + stages.sample_ms) / max(1, usage.completion_tokens - 1),
        image_tokens=usage.image_tokens,
        text_tokens=usage.prompt_tokens - usage.image_tokens,
        context=usage.prompt_tokens + usage.completion_tokens // 2,
    )


def middle(runs: Sequence[Times]) -> Times:
    """The median of each stage over runs of one prompt."""
    stages = ("encode_ms", "image_prefill_ms", "text_prefill_ms", "token_ms")
    return replace(runs[0], **{stage: median(getattr(run, stage) for run in runs) for stage in stages})
