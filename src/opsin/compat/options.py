"""llama-cpp-python's options in Opsin's words: some have a setting of the same meaning.

Those that change no answer (threads, memory mapping, logs) are accepted; those that would change one, or where it is
computed, are refused by name unless they have their default. `options.toml` lists them all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from opsin.core.errors import BadParameter
from opsin.core.files import read_table, read_text
from opsin.core.ggml_types import KV_TYPES
from opsin.core.settings import MAX_SCHEMA

_TABLE = read_table(__file__, "options.toml")
_SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty", "guard")


@dataclass(frozen=True, slots=True)
class LlamaGrammar:
    """GBNF text, or a JSON schema as text. Whether it can be used is said by the first call that uses it."""

    gbnf: str | None = None
    json_schema: str | None = None

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Self:  # noqa: ARG003 - the peer's signature
        """A GBNF grammar."""
        return cls(gbnf=grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> Self:  # noqa: ARG003
        """A GBNF grammar in a file. Raises BadParameter when it cannot be read."""
        return cls(gbnf=read_text(Path(file), MAX_SCHEMA))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Self:  # noqa: ARG003
        """A JSON schema as text."""
        return cls(json_schema=json_schema)


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EngineSettings for what was given to `Llama`; what was left out is what fits. Raises BadParameter."""
    known = _TABLE["settings"]
    made = {ours: options[name] for name, (ours, *auto) in known.items() if options.get(name) not in (None, *auto)}
    rest = {name: value for name, value in options.items() if name not in known}
    kinds = {1 if (kind := rest.pop(name, None)) is None else kind for name in ("type_k", "type_v")}
    names = [name for name, number in KV_TYPES.items() if kinds == {number}]
    if not names:
        types = ", ".join(f"{number} ({name})" for name, number in KV_TYPES.items())
        raise BadParameter(f"type_k and type_v must be the same type, one of {types}.")
    made["kv_type"] = names[0]
    _refuse(rest, "Llama")
    return made


def sampling_options(options: Mapping[str, Any], *, seed: int | None, last_n: int) -> dict[str, Any]:
    """Fields of SamplingParams for what was given to `create_chat_completion`. Raises BadParameter."""
    rest = dict(options)
    made = {name: rest.pop(name) for name in _SAMPLING if name in rest}
    made["penalty_last_n"] = last_n
    if "top_k" in rest:
        made["top_k"] = max(0, rest.pop("top_k"))
    limit = rest.pop("max_tokens", None) or 0
    made["max_tokens"] = limit if limit > 0 else None
    own = rest.pop("seed", None)
    made["seed"] = real_seed(seed if own is None else own)
    stop = rest.pop("stop", None) or ()
    made["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    bias = rest.pop("logit_bias", None) or {}
    made["logit_bias"] = {int(token): float(value) for token, value in bias.items()}
    wanted, top = rest.pop("logprobs", None), rest.pop("top_logprobs", None)
    made["logprobs"] = (top or 0) if wanted else None
    made |= _shape(rest.pop("response_format", None), rest.pop("grammar", None))
    _refuse(rest, "create_chat_completion")
    return made


def real_seed(seed: int | None) -> int | None:
    """A seed; None for those that mean "draw one" (-1 and llama.cpp's own mark for it, 2³² - 1)."""
    return None if seed in {None, -1, 2**32 - 1} else seed


def _shape(response_format: Mapping[str, Any] | None, grammar: Any) -> dict[str, str]:
    """What the answer must look like: a schema, a grammar, or nothing. The format wins, as in llama-cpp-python."""
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is not None and kind != "text":
        if kind not in {"json_object", "json_schema"}:
            raise BadParameter(f"response_format has the type {kind!r}: use text, json_object or json_schema.")
        holder = response_format if kind == "json_object" else response_format.get("json_schema", {})
        return {"json_schema": json.dumps({"type": "object"} if holder.get("schema") is None else holder["schema"])}
    if grammar is None:
        return {}
    if isinstance(grammar, LlamaGrammar) and grammar.json_schema is not None:
        return {"json_schema": grammar.json_schema}
    # llama-cpp-python's own LlamaGrammar keeps its text in `_grammar`.
    text = grammar if isinstance(grammar, str) else getattr(grammar, "gbnf", getattr(grammar, "_grammar", None))
    if not isinstance(text, str):
        raise BadParameter(f"grammar is a {type(grammar).__name__}: give a LlamaGrammar, or GBNF as text.")
    return {"grammar": text}


def _refuse(rest: Mapping[str, Any], where: str) -> None:
    refused = {**dict.fromkeys(_TABLE["refused"][where]), **_TABLE["defaults"][where]}
    for name in rest.keys() - set(_TABLE["harmless"][where]):
        if name not in refused:
            raise BadParameter(f"{where} has no option {name!r} that Opsin knows: leave it out.")
        if rest[name] not in (None, refused[name]):
            raise BadParameter(
                f"{name}={rest[name]!r} would change answers, and Opsin does not support it: leave it out."
            )
