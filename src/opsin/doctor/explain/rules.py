"""Why a request was slow: the causes of `causes.toml` that the facts hold, in words, with their arithmetic.

What costs little beside the whole request is dropped by `explain`, not here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opsin.doctor.explain.facts import Facts, Request
from opsin.doctor.explain.finders import FINDERS, TABLE


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause, and the seconds it costs (None: not told) by the sum in `arithmetic`; `at_most`: only bounded.

    A `symptom` names a slow stage without a reason in the log; it is left out where a cause of that stage is known,
    unless that one stands `aside`: true, and no reason for the time.
    """

    name: str
    where: Literal["load", "encode", "prefill", "decode", "all"]
    seconds: float | None
    arithmetic: str
    message: str
    remedy: str
    saves_seconds: float | None = None
    symptom: bool = False
    at_most: bool = False
    aside: bool = False


def _cause(name: str, row: Mapping[str, Any], facts: Facts) -> Cause | None:
    """The cause of one table of `causes.toml`, which says what its keys mean, where the facts hold it."""
    found, request, bound = FINDERS[name](facts), facts.worst, row.get("bound")
    if not found:
        return None
    values: dict[str, Any] = {"ms": None, "setup": facts.setup, "request": request, "whole_s": request.whole / 1e3}
    values["so_far"] = " so far: the log ends before the request does" if request.unfinished else ""
    values["fewer"] = " and fewer image tokens" if facts.setup.vision else ""
    values["limit"] = {"Ollama": "num_predict", "LM Studio": "'Limit Response Length'"}.get(facts.tool, "max_tokens")
    values |= found if isinstance(found, dict) else {}
    if bound:
        values["ms"], values["sums"] = _BOUNDS[bound](request)
    ms = values["ms"]
    if (ms or 0.0) < max(row.get("least_ms", 0.0), row.get("share", 0.0) * request.whole):
        return None
    values["s"] = (ms or 0.0) / 1e3
    costs = (ms, values.get("saves", ms if row.get("saves") else None))
    seconds, saves = (None if cost is None else round(cost / 1e3, 3) for cost in costs)
    return Cause(
        name=row.get("name", name),
        where=row["where"],
        seconds=seconds,
        arithmetic=values.get("sums") or row.get("sums", "").format(**values),
        message=row["message"].format(**values),
        remedy=row.get("tools", {}).get(facts.tool, row["remedy"]).format(**values),
        saves_seconds=saves,
        symptom=row.get("symptom", False),
        at_most=bool(bound or row.get("at_most")),
        aside=row.get("aside", False),
    )


def _encoder(request: Request) -> tuple[float | None, str]:
    """Milliseconds of the encoder with their sum, or a bound of them."""
    if request.encoded:
        return request.encoded, f"{request.encoded:,.0f} ms in the encoder"
    if request.before_timer:
        return request.before_timer, f"at most {request.before_timer:,.0f} ms before the timers"
    if request.timer in {"server", "ollama"} and request.prompt_ms:
        return request.prompt_ms, f"at most {request.prompt_ms:,.0f} ms, the prompt's time, which holds it"
    if request.wall_ms and not request.rest:
        wall = max(0.0, request.wall_ms - request.loading)
        return wall, f"at most the {wall / 1e3:,.1f} s that the request took{' after loading' * (request.loading > 0)}"
    return None, "the log has no time for the encoder"


def _model(request: Request) -> tuple[float | None, str]:
    """Milliseconds of prompt and answer with their sum."""
    ms = request.prompt_only + request.decoded + request.rest
    return (ms, f"{ms:,.0f} ms of prompt and answer") if ms else (None, "the log has no times")


_BOUNDS = {"encoder": _encoder, "model": _model}


def causes_in(facts: Facts) -> Iterator[Cause]:
    """All causes that the facts hold, in the order of the table; a name is told once."""
    told = set()
    for name, row in TABLE["causes"].items():
        if (cause := _cause(name, row, facts)) and cause.name not in told:
            told.add(cause.name)
            yield cause
