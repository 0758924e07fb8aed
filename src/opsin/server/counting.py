"""How many tokens a request's prompt costs: counted by the model's process, beside the answers that it writes."""

import contextlib
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from opsin.server.handler import Asked, CompletionHandler
from opsin.server.images import RequestImages
from opsin.server.schema import dumps


class CountHandler(CompletionHandler):
    """The response to a request for a count: as OpenAI writes it, which is Anthropic's with a field more.

    The prompt is built as for an answer, so it is what the answer's usage says. No image is encoded, and no running
    answer is waited for.
    """

    count_only = True

    async def _ask(
        self, asked: Asked, _: Any, images: RequestImages, held: contextlib.ExitStack, *, send: Send
    ) -> None:
        server, (prompt, params) = self._request.app.state, asked[0]
        await server.counts.take(images.key, 1)  # keys take turns
        held.callback(server.counts.leave, 1)
        params = params.model_copy(update={"json_schema": None, "grammar": None, "max_seconds": None})
        stream = server.model.engine.submit(prompt, params, count_only=True)
        held.callback(stream.cancel)
        count = (await stream.answer()).usage.prompt_tokens
        body = dumps({"object": "response.input_tokens", "input_tokens": count})
        response = Response(body, headers=self._notes, media_type="application/json")
        await response(self._request.scope, self._request.receive, send)
