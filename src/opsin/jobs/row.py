"""One row of output: the JSON of an answer or of an error, and its flat form for tables."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opsin.core.answer import Answer, more_fields, parsed
from opsin.core.errors import OpsinError

BEFORE = ("id", "source", "image_sha256", "text")
AFTER = (
    "error_code", "error", "finish_reason", "guard", "prompt_tokens", "image_tokens", "cached_tokens",
    "completion_tokens", "encode_ms", "prefill_ms", "decode_ms", "total_ms", "attempt", "job",
)  # fmt: skip
COUNTS = ("prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens")
TIMES = ("encode_ms", "prefill_ms", "decode_ms", "total_ms")
NOT_IN_JSON = {"tiles", "cached", "orientation", "source_size", "region"}

Row = dict[str, Any]


def answer_row(outcome: Answer | OpsinError) -> Row:
    """What `--json` shows of an answer, or of what went wrong. Times are in milliseconds."""
    if isinstance(outcome, OpsinError):
        return {"error": {"code": outcome.code, "message": str(outcome)}, "text": None}
    row = asdict(outcome)
    told = [{name: value for name, value in info.items() if name not in NOT_IN_JSON} for info in row["images"]]
    times = {key: {name: round(value, 3) for name, value in row[key].items()} for key in ("stages", "timings")}
    same = {name: row[name] for name in ("text", "reasoning", "finish_reason", "usage", "guard")}
    return {"error": None, **same, **more_fields(outcome), "images": told, **times}


def output_of(answer: Answer) -> Any:
    """The value of an answer as columns show it. Raises ConstraintFailed."""
    value, choice = parsed(answer), answer.choice
    if choice is None:
        return value
    return {"choice": value, "probability": choice.probabilities[choice.label], "margin": choice.margin}


def output_fields(asked: Mapping[str, Any]) -> dict[str, str]:
    """The columns that the answers of a job add to a table, with their types; `asked` has its SamplingParams."""
    kinds = {"boolean": "boolean", "scale": "integer", "choices": "string"}
    kind = next((kinds[name] for name in kinds if asked.get(name)), None)
    if kind is not None:
        return {"choice": kind, "probability": "number", "margin": "number"}
    return schema_fields(asked.get("json_schema"))


def schema_fields(schema: str | None) -> dict[str, str]:
    """The columns that a JSON schema adds to a table: the properties of its object, with their types ("" for any)."""
    try:
        properties = json.loads(schema or "{}").get("properties", {})
        kinds = {name: one.get("type") if isinstance(one, dict) else None for name, one in properties.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {name: kind if isinstance(kind, str) else "" for name, kind in kinds.items()}


def columns(fields: Collection[str]) -> tuple[str, ...]:
    """The columns of a table with these fields of a schema; a field called like a column becomes `output_…`."""
    taken = {*BEFORE, *AFTER}
    return (*BEFORE, *(f"output_{name}" if name in taken else name for name in fields), *AFTER)


def flat(row: Mapping[str, Any], fields: Collection[str]) -> list[Any]:
    """The values of `columns(fields)`: texts, numbers, booleans and None; what is nested in a field becomes JSON."""
    output, error, guard = row.get("output"), row["error"] or {}, row.get("guard") or {}
    plain = {
        **row,
        **numbers(row),
        "image_sha256": " ".join(image["sha256"] for image in row.get("images") or ()) or None,
        "error_code": error.get("code"),
        "error": error.get("message"),
        "guard": guard.get("reason"),
    }
    given = output if isinstance(output, dict) else {}
    before, after = ([plain.get(name) for name in names] for names in (BEFORE, AFTER))
    return before + [_cell(given.get(name)) for name in fields] + after


def numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The counts and times of a row, 0 where it has none. Times are in milliseconds."""
    usage, stages = row.get("usage") or {}, row.get("stages") or {}
    prefill = stages.get("image_prefill_ms", 0.0) + stages.get("text_prefill_ms", 0.0)
    none = dict.fromkeys(COUNTS, 0) | dict.fromkeys(TIMES, 0.0)
    found = {**none, **usage, **stages, "prefill_ms": round(prefill, 3)}
    return {name: found[name] for name in none}


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def from_flat(values: Sequence[Any], fields: Collection[str]) -> Row:
    """The row that a table's cells were made of, as far as they tell; its fields stay texts."""
    plain = dict(zip(columns(fields), values, strict=True))
    output = dict(zip(fields, values[len(BEFORE) :], strict=False)) if fields else None
    return {
        "error": None,
        "text": plain["text"],
        "finish_reason": plain["finish_reason"] or None,
        "usage": {name: int(plain[name]) for name in COUNTS},
        "images": [{"sha256": one} for one in (plain["image_sha256"] or "").split()],
        "guard": {"reason": plain["guard"]} if plain["guard"] else None,
        "output": output,
    }
