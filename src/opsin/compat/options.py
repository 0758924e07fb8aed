"""llama-cpp-python's options in Opsin's words, or refused by name.

Three kinds: those with a setting of the same meaning; those that change no answer (threads, memory mapping, logs),
which are taken; and those that would change an answer or where it is computed, which are refused unless they have
their default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opsin.core.errors import BadParameter

# ggml_type -> core.settings.KvType
_KV_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 8: "q8_0", 30: "bf16"}

# Options that change no answer, and that Opsin decides by itself.
_HARMLESS = frozenset((
    "n_batch", "use_mmap", "use_mlock", "numa", "no_perf", "logits_all", "offload_kqv", "op_offload", "swa_full",
))  # fmt: skip

# Options that would change answers or placement: name -> (default that is no wish, what to do instead).
_REFUSED: dict[str, tuple[Any, str]] = {
    "split_mode": (1, "llama.cpp's default split is used"),
    "main_gpu": (0, "choose the devices with CUDA_VISIBLE_DEVICES"),
    "tensor_split": (None, "choose the devices with CUDA_VISIBLE_DEVICES"),
    "vocab_only": (False, "leave it out"),
    "kv_overrides": (None, "write the values into the GGUF file"),
    "rope_scaling_type": (-1, "the model file's own scaling is used"),
    "pooling_type": (-1, "Opsin makes no text embeddings"),
    "attention_type": (-1, "the model file's own kind is used"),
    "rope_freq_base": (0.0, "the model file's own base is used"),
    "rope_freq_scale": (0.0, "the model file's own scale is used"),
    "yarn_ext_factor": (-1.0, "the model file's own scaling is used"),
    "yarn_attn_factor": (1.0, "the model file's own scaling is used"),
    "yarn_beta_fast": (32.0, "the model file's own scaling is used"),
    "yarn_beta_slow": (1.0, "the model file's own scaling is used"),
    "yarn_orig_ctx": (0, "the model file's own scaling is used"),
    "embedding": (False, "Opsin makes no text embeddings"),
    "lora_base": (None, "merge the adapter into the model file"),
    "lora_scale": (1.0, "merge the adapter into the model file"),
    "lora_path": (None, "merge the adapter into the model file"),
    "chat_format": (None, "the model's own template is used; a chat_handler chooses another"),
    "draft_model": (None, "leave it out"),
    "tokenizer": (None, "the model file's own tokenizer is used"),
    "spm_infill": (False, "leave it out"),
}

# The same for the options of a call.
_REFUSED_IN_CALLS: dict[str, tuple[Any, str]] = {
    "typical_p": (1.0, "use top_p or min_p"),
    "tfs_z": (1.0, "use top_p or min_p"),
    "mirostat_mode": (0, "use top_p or min_p"),
    "logits_processor": (None, "use logit_bias, grammar or response_format"),
}
_MIROSTAT = frozenset(("mirostat_tau", "mirostat_eta"))  # without a mode they change nothing

_ANY_OBJECT = '{"type": "object"}'


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
    kind = _KV_TYPES.get(1 if keys is None else keys)
    if kind is None or kind != _KV_TYPES.get(1 if values is None else values):
        known = ", ".join(f"{number} ({name})" for number, name in _KV_TYPES.items())
        raise BadParameter(f"type_k={keys} and type_v={values}: Opsin keeps both in one type, one of {known}.")
    return kind


def _refuse(rest: Mapping[str, Any], refused: Mapping[str, tuple[Any, str]], taken: frozenset[str], where: str) -> None:
    for name, value in rest.items():
        if name in taken:
            continue
        if name not in refused:
            raise BadParameter(f"{where} has no option {name!r} that Opsin knows: leave it out.")
        default, instead = refused[name]
        if value is not None and value != default:
            raise BadParameter(f"{name}={value!r} is not supported by Opsin: {instead}.")
