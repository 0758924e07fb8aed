"""Stage times of a loaded pair as its engine accounts for them: one new picture and one question, asked a few times."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from opsin.bench.pictures import picture_file
from opsin.core.sampling import SamplingParams
from opsin.core.settings import MediaSettings
from opsin.engine import Engine
from opsin.media import load_picture
from opsin.prompt import Message, PromptBuilder
from opsin.tune.predict import Times

QUESTION = "What is in this picture, and where is it? Tell me all about it."
ANSWER_TOKENS = 32


def measure_times(
    engine: Engine, prompts: PromptBuilder, *, pictures: bool, rounds: int, first: int = 0, text: str = QUESTION
) -> list[Times]:
    """Times of `rounds` questions, after one that is not counted. Raises BadInput, EngineError.

    Each has a new picture (numbered from `first`) and shares no prefix with another, so nothing is remembered.
    """
    return [_ask(engine, prompts, first + number, pictures, text) for number in range(rounds + 1)][1:]


def _ask(engine: Engine, prompts: PromptBuilder, number: int, pictures: bool, text: str) -> Times:
    seen = [load_picture(picture_file(number), MediaSettings())] if pictures else []
    prompt = prompts.build([Message("user", [*seen, text])])
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
    return Times(
        encode_ms=median(run.encode_ms for run in runs),
        image_prefill_ms=median(run.image_prefill_ms for run in runs),
        text_prefill_ms=median(run.text_prefill_ms for run in runs),
        token_ms=median(run.token_ms for run in runs),
        image_tokens=runs[0].image_tokens,
        text_tokens=runs[0].text_tokens,
        context=runs[0].context,
    )
