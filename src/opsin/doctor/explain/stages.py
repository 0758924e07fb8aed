"""One request as a table of stages that add up to its time."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.core.stages import Stage
from opsin.doctor.explain.facts import Request

_TITLES = {"load": "load model", "fetch": "fetch image", "encode": "vision encode"}
_LEAST_MS = 0.05


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage and its milliseconds. `at_most`: the log only bounds it. `note` says what went through it."""

    name: str
    ms: float
    note: str = ""
    at_most: bool = False


def stage_table(request: Request) -> tuple[StageRow, ...]:
    """The stages in the order in which they ran; the last one, "other", is what none of them claims."""
    if request.stages:
        times = {stage.value: request.stages.get(stage.value, 0.0) for stage in Stage}
        rows = [StageRow(_TITLES.get(name, name.replace("_", " ")), ms) for name, ms in times.items()]
        return tuple(row for row in rows if row.ms >= _LEAST_MS)
    # A server that does not tell its encoder's time hides it in the prompt's.
    prompt = "prompt (and images)" if request.timer in {"server", "ollama"} and not request.image else "prompt"
    batches = max((batch.count for batch in request.batches), default=0)
    rows = [
        StageRow("load model", request.load_ms_of_request),
        StageRow("before the timer", request.before_timer or 0.0, "image and prompt, by the wall clock", at_most=True),
        StageRow("vision encode", request.encoded, _images(request)),
        StageRow("image prefill", request.decoded, f"{batches} batches" if batches > 1 else ""),
        StageRow(prompt, request.prompt_only, _rate(request.prompt_n, request.prompt_only)),
        StageRow("decode", request.eval_ms or 0.0, _rate(request.eval_n, request.eval_ms or 0.0)),
        StageRow("sample", request.sample_ms or 0.0),
    ]
    rest = request.whole - sum(row.ms for row in rows)
    title = "between tokens" if between_ms(request) else "other"
    rows.append(StageRow(title, rest, "in none of the timers"))
    return tuple(row for row in rows if row.ms >= _LEAST_MS)


def between_ms(request: Request) -> float:
    """Milliseconds inside the generation that llama.cpp's timers do not claim: its caller's work for every token.

    Only where the timers were reset after the prompt, as llama-cpp-python's handlers do: the total of other tools
    holds loading, and waiting for a person.
    """
    if request.total_ms is None or not request.hidden_prompt or request.timer not in {"print_timings", "perf"}:
        return 0.0
    return max(0.0, request.total_ms - (request.prompt_ms or 0.0) - request.rest)


def _images(request: Request) -> str:
    count = len(request.encode_ms)
    tokens = f", {request.image_tokens:,} tokens" if request.image_tokens else ""
    return f"{count} images or slices{tokens}" if count > 1 else f"1 image{tokens}" if count else ""


def _rate(count: int | None, ms: float) -> str:
    return f"{count:,} tokens, {count / ms * 1e3:,.2f} token/s" if count and ms > 0 else ""
