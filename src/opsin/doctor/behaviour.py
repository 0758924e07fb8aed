"""How a running engine behaves: five questions about three drawn images, and what their answers give away."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from opsin.core.answer import Answer
from opsin.core.picture import Picture
from opsin.core.sampling import SamplingParams
from opsin.core.settings import MediaSettings
from opsin.doctor.check import Check
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.prompt import Message, PromptBuilder

SHORT = "Answer in one short sentence: what is in this picture?"
OTHER = "Answer in one word: which colour is largest?"
MAX_TOKENS = 96
"""Tokens an answer may take here: a short sentence takes a third of it."""

SLOW_FIRST = 1.5
"""The first picture may take so many times the encode of the next one."""

_LEAST_MS = 20.0  # encodes shorter than this differ by chance
_UNCLAIMED = 0.1  # share of the time that may belong to no stage
# What a next turn begins with in the templates of today; in an answer it means that the end was missed.
_TURNS = ("USER:", "ASSISTANT:", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "[INST]")
_CIRCLE = re.compile(r"(.+?)\1{3,}\Z", re.DOTALL)  # an answer may be cut before the guard is sure
_TAIL = 320  # characters it is looked for in


def behaviour_checks(engine: Engine, prompts: PromptBuilder, *, max_tokens: int = MAX_TOKENS) -> list[Check]:
    """Ask an idle engine that has seen no image since it was opened, and judge its answers.

    Raises what asking raises: EngineError, BadInput.
    """

    def ask(picture: Picture, question: str) -> Answer:
        prompt = prompts.build([Message(role="user", content=[picture, question])])
        return engine.submit(prompt, SamplingParams(temperature=0.0, seed=1, max_tokens=max_tokens)).result()

    first_image, *others = (drawn_picture() for _ in range(3))
    first = ask(first_image, SHORT)
    # Before others come: idle prefixes that slow decode steps down are given up on purpose.
    second = ask(first_image, OTHER)
    again = ask(first_image, SHORT)
    fresh = [ask(other, SHORT) for other in others]
    return [
        ends_check([first, *fresh, second]),
        image_cache_check(second, forks=engine.limits.forks),
        warm_up_check(first, fresh),
        stages_check(first),
        repeat_check(first, again),
    ]


def ends_check(answers: Sequence[Answer]) -> Check:
    """Do answers to short questions end by themselves?"""
    name, cut = "behaviour.ends", [answer for answer in answers if answer.finish_reason == "length"]
    most = max(answer.max_tokens for answer in answers)
    evidence: dict[str, object] = {"answers": len(answers), "cut": len(cut), "max_tokens": most}
    if not cut:
        longest = max(answer.usage.completion_tokens for answer in answers)
        message = f"Answers to short questions end by themselves, after {longest} tokens at most."
        return Check(name, "ok", message, {**evidence, "completion_tokens": longest})
    worst = max(cut, key=lambda answer: (_fault(answer) is not None, answer.usage.completion_tokens))
    guard = None if worst.guard is None else worst.guard.reason
    evidence |= {"limit": worst.limit, "guard": guard, "text": worst.text[-200:]}
    if fault := _fault(worst):
        return Check(name, "fail", f"{len(cut)} of {len(answers)} answers did not end: {fault}.", evidence)
    thinking = " while it was still thinking (--no-thinking leaves that out)" if not worst.text else ""
    message = (
        f"{len(cut)} of {len(answers)} answers to short questions were cut after "
        f"{worst.usage.completion_tokens} tokens{thinking}: they may be long by nature, else give --max-tokens."
    )
    return Check(name, "warn", message, evidence)


def _fault(answer: Answer) -> str | None:
    """What is wrong with an answer that was cut, None when it may just be long."""
    turn = next((turn for turn in _TURNS if turn in answer.text), None)
    if turn is not None:
        return (
            f"it goes on with another turn ({turn!r} in its text), so the template's end is not a token that ends "
            "answers: use the template that was published with the model"
        )
    if answer.guard is not None or _CIRCLE.search(answer.text[-_TAIL:]):
        return "it goes round in circles: check that template, projector and language model belong together"
    return None


def image_cache_check(second: Answer, *, forks: bool) -> Check:
    """Is the second question about an image served from cache? `forks` is False where no prefix can be kept."""
    image = second.images[0]
    evidence = {
        "cached": image.cached,
        "cached_tokens": second.usage.cached_tokens,
        "image_tokens": second.usage.image_tokens,
        "encode_ms": round(second.stages.encode_ms, 3),
        "image_prefill_ms": round(second.stages.image_prefill_ms, 3),
    }
    name = "behaviour.picture_cache"
    if not image.cached or second.stages.encode_ms > 0:
        message = (
            f"The second question about one image encoded it again ({second.stages.encode_ms:.0f} ms): "
            "give the embeddings room with a larger --picture-cache-bytes."
        )
        return Check(name, "fail", message, evidence)
    if forks and second.usage.cached_tokens < second.usage.image_tokens:
        message = (
            "The second question about one image found its embedding, but its prefix was gone from the KV cache "
            f"(image prefill {second.stages.image_prefill_ms:.0f} ms): give a larger --ctx."
        )
        return Check(name, "warn", message, evidence)
    kept = "its embedding and its prefix" if forks else "its embedding (this kind of model keeps no prefixes)"
    return Check(name, "ok", f"The second question about one image is served from cache: {kept}.", evidence)


def warm_up_check(first: Answer, fresh: Sequence[Answer]) -> Check:
    """Does the first image cost more than the next ones? The slowest of those counts, so that noise is not found."""
    cold, warm = first.stages.encode_ms, max(answer.stages.encode_ms for answer in fresh)
    evidence = {"first_encode_ms": round(cold, 3), "next_encode_ms": round(warm, 3)}
    message = f"The first image costs no more than the next one ({cold:.0f} and {warm:.0f} ms to encode)."
    if cold > SLOW_FIRST * warm and cold - warm > _LEAST_MS:
        message = (
            f"The first image took {cold:.0f} ms to encode and the next one {warm:.0f} ms: "
            "ask about any image once before it counts."
        )
        return Check("behaviour.warm_up", "warn", message, evidence)
    return Check("behaviour.warm_up", "ok", message, evidence)


def stages_check(answer: Answer) -> Check:
    """Do the stages of an answer add up to its whole time, and which one is the largest?"""
    stages = answer.stages.as_dict()
    total = stages.pop("total_ms")
    claimed = sum(stages.values())
    largest = max(stages, key=lambda name: stages[name])
    share = stages[largest] / total if total else 0.0
    evidence = {**stages, "total_ms": total, "largest": largest, "largest_share": round(share, 4)}
    name = "behaviour.stages"
    if abs(claimed - total) > max(1.0, 0.01 * total):
        message = f"The stages add up to {claimed:.1f} ms of {total:.1f}: the account is wrong, please report it."
        return Check(name, "fail", message, evidence)
    if stages["other_ms"] > _UNCLAIMED * total:
        message = (
            f"{stages['other_ms'] / total:.0%} of {total:.0f} ms belong to no stage: the machine may be busy with "
            "other programs, so ask again when it is idle."
        )
        return Check(name, "warn", message, evidence)
    message = f"The stages add up to {total:.0f} ms; the largest is {largest.removesuffix('_ms')} with {share:.0%}."
    return Check(name, "ok", message, evidence)


def repeat_check(first: Answer, again: Answer) -> Check:
    """Does the same question get the same tokens at temperature 0?"""
    if first.tokens == again.tokens:
        message = f"The same question gets the same {len(first.tokens)} tokens at temperature 0."
        return Check("behaviour.repeat", "ok", message, {"tokens": len(first.tokens)})
    pairs = enumerate(zip(first.tokens, again.tokens, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), min(len(first.tokens), len(again.tokens)))
    message = (
        f"The same question got other tokens from the {at + 1}th on at temperature 0: batches of other sizes add in "
        "another order, which may turn two tokens that are as likely; do not build on equal texts."
    )
    evidence = {"first_difference": at, "tokens": len(first.tokens), "tokens_again": len(again.tokens)}
    return Check("behaviour.repeat", "warn", message, evidence)


def drawn_picture() -> Picture:
    """A square of some colour on white, new every time so that no cache has it, and in no time: not what is judged."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (640, 480), "white")
    red, green, blue = os.urandom(3)
    ImageDraw.Draw(image).rectangle((180, 100, 460, 380), fill=(red, green, blue))
    return replace(load_picture(image, MediaSettings()), fetch_ms=0.0, decode_ms=0.0)
