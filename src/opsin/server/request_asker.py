"""Rows of a job that are whole chat requests: answered as the server answers them, without a server."""

import json
from typing import Any

from opsin.core.choice import CHOICE_FIELDS
from opsin.core.errors import BadInput, EngineDied
from opsin.jobs.asker import Asked, Asker
from opsin.jobs.row import Row
from opsin.server.app import rows_app
from opsin.server.batch_runner import post
from opsin.server.handler import ModelManager
from opsin.server.images import ImageLoader
from opsin.worker import NotReady

_AGAIN = {"not_ready": NotReady, "engine_died": EngineDied, "engine_closed": EngineDied}


class RequestRefused(BadInput):
    """A request was answered with an error; `code` is the one in its body."""


class RequestAsker(Asker):
    """Asks rows with a `body`, a chat request in OpenAI's form, which loads its images itself.

    `about` goes into each answer's row, `defaults` into each request.
    """

    def __init__(self, model: ModelManager, images: ImageLoader, about: Row, defaults: Row) -> None:
        self._app = rows_app(model, images)
        self._about, self._images, self.slots, self._defaults = about, images, model.slots, defaults

    async def ask(self, asked: Asked) -> Row:
        """The answer's row, and the whole response. Raises RequestRefused, NotReady, EngineDied."""
        body = {**self._defaults, **(asked.item.body or {}), "stream": False}
        response = await post(self._app, "", "/v1/chat/completions", json=body)
        found: dict[str, Any] = json.loads(response.content)
        if "error" in found:
            code, said = str(found["error"].get("code")), str(found["error"].get("message"))
            if code in _AGAIN:
                raise _AGAIN[code](said)
            refused = RequestRefused(said)
            refused.code = code  # type: ignore[misc]
            raise refused
        return _row(found, body) | self._about

    def close(self) -> None:
        """End the processes that decode."""
        self._images.close()


def _row(found: dict[str, Any], body: dict[str, Any]) -> Row:
    choice, usage = found["choices"][0], found["usage"]
    details, message = usage.get("prompt_tokens_details") or {}, choice["message"]
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    counts |= {name: details.get(name, 0) for name in ("image_tokens", "cached_tokens")}
    row = {
        "error": None,
        "text": message["content"] or "",
        "reasoning": message.get("reasoning_content"),
        "finish_reason": choice["finish_reason"],
        "usage": counts,
        **{name: found.get(name) for name in ("guard", "images", "stages", "timings")},
        **{name: found[name] for name in (*CHOICE_FIELDS, "confidence", "boxes") if found.get(name) is not None},
        "response": found,
    }
    wanted = (body.get("response_format") or {}).get("type")
    if wanted in {"json_schema", "json_object"} and choice["finish_reason"] == "stop":
        row["output"] = json.loads(row["text"])
    return row
