"""Does a running engine see its images, end its answers and follow its template? Two questions tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from opsin.core.answer import Answer
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import ImageSettings
from opsin.doctor.check import Check
from opsin.engine import Engine
from opsin.images import load_image
from opsin.prompt import Message, PromptBuilder

QUESTION = "Answer in one short sentence: what is in this image?"
MAX_TOKENS = 96
"""Most tokens of an answer here: a short sentence takes a third of it."""

# What the next turn begins with in common templates; in an answer it means that the end was missed.
_TURNS = ("USER:", "ASSISTANT:", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "[INST]")
_LOOP = re.compile(r"(.+?)\1{3,}\Z", re.DOTALL)
_TAIL = 320  # characters in which a loop is looked for


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
        message = (
            "A red and a blue square give exactly the same answer, so the model does not see its images: use the "
            "projector and the chat template that were published with it."
        )
        return Check("behaviour.sees", "fail", message, evidence)
    return Check("behaviour.sees", "ok", "The answer depends on the image.", evidence)


def _ends(answers: Sequence[Answer]) -> Check:
    """An answer that was cut is a fault where it starts another turn or repeats itself; else it may just be long."""
    cut = [answer for answer in answers if answer.finish_reason == "length"]
    evidence = {"cut": len(cut), "max_tokens": MAX_TOKENS, "text": "".join(answer.text[-200:] for answer in cut[:1])}
    if not cut:
        return Check("behaviour.ends", "ok", "Answers to short questions end by themselves.", evidence)
    start = f"{len(cut)} of {len(answers)} answers did not end"
    for answer in cut:
        turn = next((turn for turn in _TURNS if turn in answer.text), None)
        if turn is not None:
            message = (
                f"{start}: another turn follows ({turn!r} in the text), so the template's end is not a token that "
                "ends answers; use the template that was published with the model."
            )
            return Check("behaviour.ends", "fail", message, evidence)
        if answer.guard is not None or _LOOP.search(answer.text[-_TAIL:]):
            message = f"{start}, they repeat themselves: check that template, projector and language model match."
            return Check("behaviour.ends", "fail", message, evidence)
    message = (
        f"{start} within {MAX_TOKENS} tokens: they may be long by nature, else set --max-tokens (or --no-thinking)."
    )
    return Check("behaviour.ends", "warn", message, evidence)


def drawn_image(colour: str = "red") -> Image:
    """A square of that colour on white."""
    import PIL.Image
    from PIL import ImageDraw

    image = PIL.Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(image).rectangle((180, 100, 460, 380), fill=colour)
    return replace(load_image(image, ImageSettings()), fetch_ms=0.0, decode_ms=0.0)
