"""Every error leaves the server as OpenAI's error body, or as Anthropic's where its API is used."""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.core.errors import BadParameter, EngineDied, ModelError, OpsinError, found_wrong
from opsin.core.files import read_table

_LOG = logging.getLogger("opsin.server")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_TYPES, 408: "timeout_error", 413: "request_too_large", 503: "overloaded_error"}
_NO_OBJECT = frozenset(("missing", "model_attributes_type", "model_type", "dict_type"))
_TAGS = frozenset(read_table(__file__, "fields.toml")["tags"])

# A path of the API behind no base path, or behind one too many.
_NEARLY = re.compile(
    r"(/v1/v1|/api/v1|/openai/v1|/api|)/(chat/completions|completions|responses|models|files|batches|messages)(/.*)?"
)


class BadField(BadParameter):
    """A field of a request cannot be used; `param` names it."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(BadField, http_status=404):
    """The request names a model that is not served."""

    code = "model_not_found"

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"The model {name[:100]!r} is not served here: ask for {served!r}.", "model")


class NotFound(BadField, http_status=404):
    """No file or batch of the key is called so."""


class StoreFailed(OpsinError, http_status=503):
    """The database of files and batches does not do its part."""


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The error object; its `type` follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def is_anthropic(scope: Scope) -> bool:
    """Whether a request is for Anthropic's API, or from one of its clients."""
    return scope["path"].startswith("/v1/messages") or any(name == b"anthropic-version" for name, _ in scope["headers"])


def anthropic_error(status: int, message: str, code: str, request_id: str | None = None) -> dict[str, Any]:
    """The error object of Anthropic's API; `details` has the code."""
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message, "details": {"error_code": code}}
    return {"type": "error", "error": error, "request_id": request_id}


_EXAMPLE = error_body(400, "The field 'messages' is missing.", "bad_parameter", "messages")
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error.", "content": {"application/json": {"example": _EXAMPLE}}}
}
"""What the OpenAPI document says about errors."""
_ANTHROPIC_EXAMPLE = anthropic_error(400, "The field 'messages' is missing.", "bad_parameter", "5ccf7d0a…")
ANTHROPIC_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error.", "content": {"application/json": {"example": _ANTHROPIC_EXAMPLE}}}
}


class ErrorResponse(Response):
    """An error as the API's clients expect it. Sending it also notes its code in the request's stats."""

    media_type = "application/json"

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        body = json.dumps(error_body(status, message, code, param), ensure_ascii=False)
        # Lone surrogates, which a client may have sent in a name, become question marks.
        super().__init__(body.encode("utf-8", "replace"), status, headers)
        self._code, self._message = code, message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if (stats := scope.get("state", {}).get("stats")) is not None:
            stats.refused = self._code
        if is_anthropic(scope):
            body = anthropic_error(self.status_code, self._message, self._code, stats and stats.id)
            self.body = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def explain(error: Exception) -> tuple[int, str, str, str | None]:
    """Status, sentence, code and field of any error. Sentences that may name files only go to the log."""
    if isinstance(error, (ModelError, EngineDied)):
        _LOG.error("%s: %s", error.code, error)
        return error.http_status, "The model cannot be used now: the server's log says why.", error.code, None
    if isinstance(error, OpsinError):
        return error.http_status, str(error), error.code, getattr(error, "param", None)
    if isinstance(error, RequestValidationError):
        message, param = _sentence(error.errors()[0])
        return 400, message, "bad_parameter", param
    if isinstance(error, HTTPException):
        # FastAPI raises it where it cannot read a body at all, and Starlette for addresses and methods.
        message, code = "The body is not JSON in UTF-8, or nested too deeply: send plain JSON in UTF-8.", "bad_request"
        if error.status_code == 404:
            message, code = "There is nothing at this address: /openapi.json lists what there is.", "not_found"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message, code = f"This address does not take this method: use {allowed}.", "method_not_allowed"
        return error.status_code, message, code, None
    _LOG.error("a request failed", exc_info=error)
    return 500, "The server failed on this request: its log says why.", "internal_error", None


async def _respond(request: Request, error: Exception) -> Response:
    status, message, code, param = explain(error)
    if code == "not_found" and (near := _NEARLY.fullmatch(request.url.path)):
        base = f"{request.url.scheme}://{request.url.netloc}{request.app.state.root}"
        base += "" if near[2] == "messages" or is_anthropic(request.scope) else "/v1"
        message = f"There is nothing at this address: the base URL of this API is {base}, so set that in your client."
    headers = dict(getattr(error, "headers", None) or {})
    if status in {429, 503}:
        headers["Retry-After"] = str(getattr(error, "retry_after", 1))
    return ErrorResponse(status, message, code, param, headers)


HANDLERS: Any = dict.fromkeys((OpsinError, RequestValidationError, HTTPException, Exception), _respond)
"""Give every error of an application the same shape."""


def _sentence(first: Mapping[str, Any]) -> tuple[str, str | None]:
    """One sentence about one of pydantic's findings, and the field it is about."""
    kind, param = first["type"], _path(first["loc"])
    context = first.get("ctx") or {}
    said = _short(found_wrong(param, first["msg"]) if param else first["msg"].removeprefix("Value error, "))
    if kind == "json_invalid":
        return f"The body is not JSON: {_short(context.get('error', 'it cannot be read'))}.", None
    if param is None and kind in _NO_OBJECT:
        return "The body is missing or is not a JSON object: send one, with Content-Type: application/json.", None
    if kind in {"extra_forbidden", "none_required"}:
        said = f"The field {param!r} is not supported: leave it out"
    elif kind == "missing":
        said = f"The field {param!r} is missing"
    elif kind == "union_tag_invalid":
        said = f"{param}: the type {_short(context['tag'])!r} is not supported: use one of {context['expected_tags']}"
        param = f"{param}.type"
    elif kind == "union_tag_not_found":
        said = f"{param}: give an object with a type"
    elif param is None:
        said = f"{said[:1].upper()}{said[1:]}"
    return f"{said}.", param


def _path(loc: Iterable[int | str]) -> str | None:
    """`messages[0].content[1].image_url` for pydantic's location."""
    path, before = "", ""
    for step in loc:
        if isinstance(step, int):
            path, before = f"{path}[{step}]", ""
            continue
        # Members of unions are named as well: as `literal[…]`, by their class, or by the tag that chose them.
        is_tag = path.endswith("]") and not before and step in _TAGS
        if not is_tag and step not in {before, "body", "query"} and "[" not in step and not step[:1].isupper():
            path = f"{path}.{step}" if path else step
        before = "/" if is_tag else "" if step in {"body", "query"} else step
    return _short(path) or None


def _short(value: object) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in str(value)[:400].rstrip("."))
