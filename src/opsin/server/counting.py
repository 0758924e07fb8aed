"""How many tokens a request's prompt costs: counted by the model's process, beside the answers that it writes."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Send

from opsin.server.handler import Asked, CompletionHandler
from opsin.server.schema import dumps


class CountHandler(CompletionHandler):
    """The response to a request for a count: as OpenAI writes it, which is Anthropic's with a field more.

    The prompt is built as for an answer, so it is what the answer's usage says. No image is encoded, and no running
    answer is waited for.
    """

    count_only = True

    async def _ask(self, asked: Asked, *rest: Any, send: Send) -> None:  # noqa: ARG002 - all else is for answers
        stream = self._request.app.state.model.engine.submit(asked[0][0], count_only=True)
        count = (await stream.answer()).usage.prompt_tokens
        body = dumps({"object": "response.input_tokens", "input_tokens": count})
        response = Response(body, headers=self._notes, media_type="application/json")
        await response(self._request.scope, self._request.receive, send)
