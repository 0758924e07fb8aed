"""llama-cpp-python's options in Opsin's words, or refused by name.

Three kinds: those with a setting of the same meaning; those that change no answer (threads, memory mapping, logs),
which are taken; and those that would change an answer or where it is computed, which are refused unless they have
their default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.core.errors import BadGrammar, BadParameter
from opsin.core.ggml_types import KV_TYPES

# Options that change no answer, and that Opsin decides by itself.
_HARMLESS = frozenset((
    "n_batch", "use_mmap", "use_mlock", "numa", "no_perf", "logits_all", "offload_kqv", "op_offload", "swa_full",
))  # fmt: skip


def _with_reason(reason: str, **defaults: Any) -> dict[str, tuple[Any, str]]:
    return {name: (default, reason) for name, default in defaults.items()}


# Options that would change answers or placement: name -> (the default, which is taken; what to do instead).
_REFUSED: dict[str, tuple[Any, str]] = {
    **_with_reason("llama.cpp's default split is used", split_mode=1),
    **_with_reason("choose the devices with CUDA_VISIBLE_DEVICES", main_gpu=0, tensor_split=None),
    **_with_reason("leave it out", vocab_only=False, draft_model=None, spm_infill=False),
    **_with_reason("write the values into the GGUF file", kv_overrides=None),
    **_with_reason("Opsin makes no text embeddings", pooling_type=-1, embedding=False),
    **_with_reason("merge the adapter into the model file", lora_base=None, lora_scale=1.0, lora_path=None),
    **_with_reason("the model's own template is used; a chat_handler chooses another", chat_format=None),
    **_with_reason("the model file's own tokenizer is used", tokenizer=None),
    **_with_reason("the model file's own kind is used", attention_type=-1),
    **_with_reason("the model file's own base is used", rope_freq_base=0.0),
    **_with_reason("the model file's own scale is used", rope_freq_scale=0.0),
    **_with_reason(
        "the model file's own scaling is used",
        rope_scaling_type=-1,
        yarn_ext_factor=-1.0,
        yarn_attn_factor=1.0,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_orig_ctx=0,
    ),
}

# The same for the options of a call.
_REFUSED_IN_CALLS: dict[str, tuple[Any, str]] = {
    **_with_reason("use top_p or min_p", typical_p=1.0, tfs_z=1.0, mirostat_mode=0),
    **_with_reason("use logit_bias, grammar or response_format", logits_processor=None),
}
_MIROSTAT = frozenset(("mirostat_tau", "mirostat_eta"))  # without a mode they change nothing

_ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class LlamaGrammar:
    """GBNF text, or a JSON schema as text. Whether it can be used is said by the first call that uses it."""

    gbnf: str | None = None
    json_schema: str | None = None

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:  # noqa: ARG003 - the peer's signature
        """A GBNF grammar."""
        return cls(gbnf=grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> LlamaGrammar:
        """A GBNF grammar in a file. Raises BadGrammar when it cannot be read."""
        try:
            return cls.from_string(Path(file).read_text(encoding="utf-8"), verbose)
        except (OSError, UnicodeDecodeError) as error:
            raise BadGrammar(f"The grammar file {file} cannot be read: {error}.") from error

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:  # noqa: ARG003
        """A JSON schema as text."""
        return cls(json_schema=json_schema)


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of EngineSettings for what was given to `Llama`. Raises BadParameter.

    Without `n_gpu_layers` Opsin puts on a GPU what fits, without `n_ctx` the context is what fits; -1 and 0 mean the
    same there as in llama-cpp-python.
    """
    rest = dict(options)
    made: dict[str, Any] = {}

    def take(name: str, into: str, *nothing: Any) -> None:
        value = rest.pop(name, None)
        if value is not None and value not in nothing:
            made[into] = value

    take("n_ctx", "ctx", 0)
    take("n_gpu_layers", "gpu_layers", -1)
    take("n_threads", "threads")
    take("n_threads_batch", "threads_batch")
    take("n_ubatch", "ubatch")
    take("flash_attn", "flash_attention", False)
    kinds = {name: rest.pop(name, None) for name in ("type_k", "type_v")}
    if any(kind is not None for kind in kinds.values()):
        made["kv_type"] = _kv_type(kinds["type_k"], kinds["type_v"])
    _refuse(rest, _REFUSED, _HARMLESS, "Llama")
    return made


def sampling_options(options: Mapping[str, Any], *, seed: int | None, last_n: int) -> dict[str, Any]:
    """Fields of SamplingParams for what was given to `create_chat_completion`. Raises BadParameter."""
    rest = dict(options)
    same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty", "guard")
    made = {name: rest.pop(name) for name in same if name in rest}
    made["penalty_last_n"] = last_n
    if "top_k" in rest:
        made["top_k"] = max(0, rest.pop("top_k"))
    limit = rest.pop("max_tokens", None)
    made["max_tokens"] = limit if limit is not None and limit > 0 else None
    own = rest.pop("seed", None)
    made["seed"] = real_seed(own if own is not None else seed)
    stop = rest.pop("stop", None) or []
    made["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    bias = rest.pop("logit_bias", None)
    if bias:
        made["logit_bias"] = {int(token): float(value) for token, value in bias.items()}
    wanted, top = rest.pop("logprobs", None), rest.pop("top_logprobs", None)
    if wanted:
        made["logprobs"] = top or 0
    made.update(_shape(rest.pop("response_format", None), rest.pop("grammar", None)))
    _refuse(rest, _REFUSED_IN_CALLS, _MIROSTAT, "create_chat_completion")
    return made


def real_seed(seed: int | None) -> int | None:
    """A seed; None for those that mean "draw one" (-1 and llama.cpp's own mark for it, 2³² - 1)."""
    return None if seed is None or seed in {-1, 2**32 - 1} else seed


def _shape(response_format: Mapping[str, Any] | None, grammar: object) -> dict[str, str]:
    """What the answer must look like: a schema, a grammar, or nothing. The format wins, as in llama-cpp-python."""
    kind = None if response_format is None else response_format.get("type")
    if response_format is not None and kind != "text":
        schema = response_format.get("schema")
        if kind == "json_schema":
            schema = response_format.get("json_schema", {}).get("schema")
        elif kind != "json_object":
            raise BadParameter(f"response_format has the type {kind!r}: use text, json_object or json_schema.")
        return {"json_schema": _ANY_OBJECT if schema is None else json.dumps(schema)}
    if grammar is None:
        return {}
    schema_text = getattr(grammar, "json_schema", None)
    if isinstance(schema_text, str):
        return {"json_schema": schema_text}
    # llama-cpp-python's own LlamaGrammar keeps its text in `_grammar`.
    text = grammar if isinstance(grammar, str) else getattr(grammar, "gbnf", getattr(grammar, "_grammar", None))
    if not isinstance(text, str):
        raise BadParameter(f"grammar is a {type(grammar).__name__}: give a LlamaGrammar, or GBNF as text.")
    return {"grammar": text}


def _kv_type(keys: int | None, values: int | None) -> str:
    wanted = {1 if kind is None else kind for kind in (keys, values)}
    for name, number in KV_TYPES.items():
        if wanted == {number}:
            return name
    known = ", ".join(f"{number} ({name})" for name, number in KV_TYPES.items())
    raise BadParameter(f"type_k={keys} and type_v={values}: Opsin keeps both in one type, one of {known}.")


def _refuse(rest: Mapping[str, Any], refused: Mapping[str, tuple[Any, str]], taken: frozenset[str], where: str) -> None:
    for name, value in rest.items():
        if name in taken:
            continue
        if name not in refused:
            raise BadParameter(f"{where} has no option {name!r} that Opsin knows: leave it out.")
        default, instead = refused[name]
        if value is not None and value != default:
            raise BadParameter(f"{name}={value!r} is not supported by Opsin: {instead}.")
