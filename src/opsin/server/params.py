"""A request's fields as sampling parameters, within the limits of the server's settings."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from opsin.core.sampling import SamplingParams
from opsin.core.server_settings import ServerSettings
from opsin.server.errors import BadField, UnknownModel, field_error
from opsin.server.model import LoadedModel
from opsin.server.schema import Common, Drawn
from opsin.server.security import is_loopback

_SEEDS = 2**32 - 1
_MOST_TOP_K = 2**31 - 1
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "ignore_eos",
    "guard", "max_seconds", "grammar",
)  # fmt: skip
MOST_DEPTH = 64
ANY_OBJECT = '{"type":"object"}'


def check_model(name: str | None, model: LoadedModel, settings: ServerSettings) -> None:
    """Raises UnknownModel where only the served name is taken: with strict_model, and away from loopback."""
    if name is None or name == model.name or not (settings.strict_model or not is_loopback(settings.host)):
        return
    raise UnknownModel(f"The model {name[:100]!r} is not served here: ask for {model.name!r}.", "model")


def sampling(body: Common, settings: ServerSettings, limit_name: str = "max_tokens", **more: Any) -> SamplingParams:
    """The parameters of a request; `more` are fields of SamplingParams that the caller made itself.

    What a request leaves out comes from the settings, then from SamplingParams. `limit_name` is how the request calls
    the limit on tokens. Raises BadField.
    """
    values: dict[str, Any] = {"guard": settings.guard}
    values |= {name: getattr(body, name) for name in _SAME if getattr(body, name, None) is not None}
    if isinstance(body, Drawn):
        values |= _drawn(body, settings)
    values |= {name: value for name, value in more.items() if value is not None}
    if values.get("max_tokens") is None:
        values["max_tokens"] = settings.max_tokens
    if settings.max_seconds is not None:
        values["max_seconds"] = min(settings.max_seconds, values.get("max_seconds", settings.max_seconds))
    if values.get("top_k", 0) > _MOST_TOP_K:
        raise BadField(f"top_k is more than {_MOST_TOP_K}: send a smaller one, or 0 for none.", "top_k")
    if (grammar := values.get("grammar")) is not None:
        check_schema(grammar, settings, "grammar")
        if values.get("json_schema") is not None:
            raise BadField("grammar cannot be used with response_format or a forced tool: leave one out.", "grammar")
    try:
        return SamplingParams(**values)
    except ValidationError as error:
        raise field_error(error, {"max_tokens": limit_name, "logprobs": "top_logprobs"}) from None


def _drawn(body: Drawn, settings: ServerSettings) -> dict[str, Any]:
    values: dict[str, Any] = {}
    stop = body.stop or []
    if len(stop) > settings.max_stop:
        raise BadField(f"stop has {len(stop)} strings, and {settings.max_stop} are the limit: send fewer.", "stop")
    values["stop"] = tuple(stop)
    bias = body.logit_bias or {}
    if len(bias) > settings.max_logit_bias:
        raise BadField(
            f"logit_bias has {len(bias)} tokens, and {settings.max_logit_bias} are the limit: send fewer.", "logit_bias"
        )
    try:
        values["logit_bias"] = {int(token): value for token, value in bias.items()}
    except ValueError:
        raise BadField("logit_bias names a token that is no number: use token ids.", "logit_bias") from None
    values["seed"] = drawn_seed(body.seed)
    return values


def drawn_seed(seed: int | None) -> int | None:
    """A seed in the engine's range; None, so that one is drawn, for none and for -1, as with llama-server."""
    return None if seed is None or seed == -1 else seed % _SEEDS


def choices(params: SamplingParams, n: int | None, settings: ServerSettings) -> list[SamplingParams]:
    """The parameters of each of `n` choices: the same, but with seeds of their own. Raises BadField."""
    n = n or 1
    if n > settings.max_n:
        raise BadField(f"n is {n}, and {settings.max_n} are the limit: ask for fewer choices.", "n")
    if n == 1 or params.seed is None:
        return [params] * n
    return [params.model_copy(update={"seed": (params.seed + i) % _SEEDS}) for i in range(n)]


def wants_usage(body: Drawn) -> bool:
    """Whether a stream ends with the token counts. Raises BadField where there is no stream."""
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options needs stream: set it to true, or leave stream_options out.", "stream_options")
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def top_logprobs(top: int | None, settings: ServerSettings, param: str) -> int | None:
    """How many alternatives are told of each token. Raises BadField over the limit."""
    if top is not None and not 0 <= top <= settings.max_top_logprobs:
        raise BadField(f"{param} is {top}: 0 to {settings.max_top_logprobs} are possible here.", param)
    return top


def schema_text(schema: dict[str, Any] | None, settings: ServerSettings, param: str) -> str:
    """A JSON schema as text; any object where none was given. Raises BadField over the limit on bytes."""
    if not schema:
        return ANY_OBJECT
    if is_deep(schema):
        raise BadField(f"{param} is nested more than {MOST_DEPTH} deep: make it flatter.", param)
    text = json.dumps(schema)
    check_schema(text, settings, param)
    return text


def is_deep(value: Any) -> bool:
    """Whether JSON is nested so deeply that code which walks through it might not come back."""
    level, depth = [value], 0
    while level and depth <= MOST_DEPTH:
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level, depth = [item for items in inner for item in items], depth + 1
    return bool(level)


def check_schema(text: str, settings: ServerSettings, param: str) -> None:
    """Raises BadField for a schema or grammar that is larger than the settings allow."""
    size = len(text.encode("utf-8", "replace"))
    if size > settings.max_schema_bytes:
        raise BadField(
            f"{param} has {size:,} bytes, and {settings.max_schema_bytes:,} are the limit: make it smaller.", param
        )
