"""One request as a table of stages that add up to its time."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.doctor.explain.request import Request

_OPSIN = {
    "load": "load model",
    "queue": "queue",
    "fetch": "fetch picture",
    "image_decode": "image decode",
    "preprocess": "preprocess",
    "encode": "vision encode",
    "image_prefill": "image prefill",
    "text_prefill": "text prefill",
    "decode": "decode",
    "sample": "sample",
    "detokenize": "detokenize",
    "other": "other",
}
_LEAST_MS = 0.05


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage and its milliseconds. `at_most`: the log only bounds it. `note` says what went through it."""

    name: str
    ms: float
    note: str = ""
    at_most: bool = False

    @property
    def seconds(self) -> float:
        """The same in seconds."""
        return self.ms / 1e3


def stage_table(request: Request) -> tuple[StageRow, ...]:
    """The stages in the order in which they ran; the last one, "other", is what none of them claims."""
    if request.stages:
        rows = [StageRow(title, request.stages.get(name, 0.0)) for name, title in _OPSIN.items()]
        return tuple(row for row in rows if row.ms >= _LEAST_MS)
    rows = [
        StageRow("load model", request.load_ms_of_request),
        StageRow(
            "before the timer", request.before_timer or 0.0, "picture and prompt, by the wall clock", at_most=True
        ),
        StageRow("vision encode", request.encoded, _pictures(request)),
        StageRow("image prefill", request.decoded, _batches(request)),
        StageRow(_prompt_name(request), request.prompt_only, _rate(request.prompt_n, request.prompt_only)),
        StageRow("decode", request.eval_ms or 0.0, _rate(request.eval_n, request.eval_ms or 0.0)),
        StageRow("sample", request.sample_ms or 0.0),
    ]
    rest = request.whole - sum(row.ms for row in rows)
    title = "between tokens" if between_tokens(request) else "other"
    rows.append(StageRow(title, rest, "in none of the timers"))
    return tuple(row for row in rows if row.ms >= _LEAST_MS)


def between_tokens(request: Request) -> float:
    """Milliseconds inside the generation that llama.cpp's timers do not claim: its caller's work for every token.

    Only where the timers were reset after the prompt, as llama-cpp-python's handlers do: the total of other tools
    holds loading, and waiting for a person.
    """
    if request.total_ms is None or not request.hidden_prompt or request.timer not in {"print_timings", "perf"}:
        return 0.0
    return max(0.0, request.total_ms - (request.prompt_ms or 0.0) - request.rest)


def _prompt_name(request: Request) -> str:
    """A server that does not tell its encoder's time hides it in the prompt's."""
    hides = request.timer in {"server", "ollama"} and not request.image
    return "prompt (and pictures)" if hides else "prompt"


def _pictures(request: Request) -> str:
    count = len(request.encode_ms)
    tokens = f", {request.image_tokens:,} tokens" if request.image_tokens else ""
    return f"{count} pictures or slices{tokens}" if count > 1 else f"1 picture{tokens}" if count else ""


def _batches(request: Request) -> str:
    return f"{request.batches[0].count} batches" if request.batches and request.batches[0].count > 1 else ""


def _rate(count: int | None, ms: float) -> str:
    return f"{count:,} tokens, {count / ms * 1e3:,.2f} token/s" if count and ms > 0 else ""
