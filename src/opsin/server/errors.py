"""OpenAI's error body for whatever can go wrong, and the doors through which errors leave."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.core.errors import BadParameter, EngineDied, ModelError, OpsinError
from opsin.server.record import Record

_LOG = logging.getLogger("opsin.server")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_MOST_WORDS = 400
_NO_OBJECT = frozenset(("missing", "model_attributes_type", "model_type", "dict_type"))
RETRY_SECONDS = 1
"""What Retry-After says where nothing better is known."""
# Names that pydantic puts into a place's name for the member of a union that it tried.
_TAGS = frozenset((
    "text", "image_url", "input_text", "input_image", "output_text", "message", "function_call",
    "function_call_output", "reasoning",
))  # fmt: skip


class ErrorDetail(BaseModel):
    """What went wrong: a sentence, OpenAI's kind, the field, and a code that stays the same."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "An error."}}
"""What the OpenAPI document says of errors."""


class BadField(BadParameter):
    """A field of a request cannot be used; `param` names it."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message, param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownModel(BadField):
    """The request names a model that is not served."""

    code = "model_not_found"
    http_status = 404


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. Half characters, which a client may have sent in a name, become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The error object; its `type` follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorResponse(Response):
    """An error as OpenAI's clients expect it; the request's record is told its code."""

    media_type = "application/json"

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(dumps(error_body(status, message, code, param)), status, headers)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        record: Record | None = scope.get("state", {}).get("record")
        if record is not None:
            record.refused = self._code
        await super().__call__(scope, receive, send)


def error_response(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> ErrorResponse:
    """An error to be sent, by handlers and by middlewares alike."""
    return ErrorResponse(status, message, code, param, headers)


def told(error: OpsinError) -> tuple[int, str, str, str | None]:
    """Status, sentence, code and field of an error of ours. Sentences that may name files stay in the log."""
    if isinstance(error, (ModelError, EngineDied)):
        _LOG.error("%s: %s", error.code, error)
        return error.http_status, "The model cannot be used now: the server's log says why.", error.code, None
    return error.http_status, str(error), error.code, getattr(error, "param", None)


def response_to(error: OpsinError) -> ErrorResponse:
    """The answer to an error of ours; who may try again is told when."""
    status, message, code, param = told(error)
    headers = {}
    if status in {429, 503}:
        headers["Retry-After"] = str(getattr(error, "retry_after", None) or RETRY_SECONDS)
    return error_response(status, message, code, param, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave in one shape."""
    app.add_exception_handler(OpsinError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, OpsinError)
    return response_to(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = finding(error.errors())
    return error_response(400, message, "bad_parameter", param)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(404, "There is nothing at this address: /openapi.json tells what there is.", "not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"This address does not take this method: use {allowed}."
        return error_response(405, message, "method_not_allowed", headers=error.headers)
    return error_response(error.status_code, f"{_short(error.detail)}.", "bad_request", headers=error.headers)


async def _unexpected(_: Request, error: Exception) -> Response:
    _LOG.error("a request failed: %s", type(error).__name__)
    return error_response(500, "The server failed on this request: its log says why.", "internal_error")


def field_error(error: ValidationError, names: Mapping[str, str] | None = None) -> BadField:
    """Pydantic's first finding about a value made of a request's fields; `names` tells how requests call them."""
    message, param = finding(error.errors(), names)
    return BadField(message, param)


def finding(errors: Sequence[Any], names: Mapping[str, str] | None = None) -> tuple[str, str | None]:
    """One sentence about the first of pydantic's findings, and the field it is about."""
    first = errors[0]
    kind, param = first["type"], _place(first["loc"], names or {})
    context = first.get("ctx") or {}
    said = _short(first["msg"])
    if kind == "json_invalid":
        return f"The body is no JSON: {_short(context.get('error', 'it cannot be read'))}.", None
    if param is None and kind in _NO_OBJECT:
        return "The body is missing or no JSON object: send one, with Content-Type: application/json.", None
    if kind in {"extra_forbidden", "none_required"}:
        said = f"The field {param!r} is not supported: leave it out"
    elif kind == "missing":
        said = f"The field {param!r} is missing"
    elif kind == "union_tag_invalid":
        said = f"{param}: the type {_short(context['tag'])!r} is not supported: use one of {context['expected_tags']}"
        param = f"{param}.type"
    elif kind == "union_tag_not_found":
        said = f"{param}: give an object with a type"
    else:
        said = f"{param}: {said}" if param else f"{said[:1].upper()}{said[1:]}"
    return f"{said}.", param


def _place(loc: Iterable[int | str], names: Mapping[str, str]) -> str | None:
    """`messages[0].content[1].image_url` for where pydantic says it is."""
    place, before = "", ""
    for step in loc:
        if isinstance(step, int):
            place, before = f"{place}[{step}]", ""
            continue
        # Members of unions are named as well: as `literal[…]`, by their class, or by the tag that chose them.
        is_tag = place.endswith("]") and not before and step in _TAGS
        if not is_tag and step not in {before, "body"} and "[" not in step and not step[:1].isupper():
            name = names.get(step, step)
            place = f"{place}.{name}" if place else name
        before = "/" if is_tag else "" if step == "body" else step
    return _short(place) or None


def _short(value: object) -> str:
    return str(value).removeprefix("Value error, ")[:_MOST_WORDS].rstrip(".")
