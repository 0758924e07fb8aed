"""POST /v1/completions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.prompt import Prompt, TextPart
from opsin.server.context import Context
from opsin.server.errors import BadField, at_most
from opsin.server.handler import CompletionHandler, Job
from opsin.server.limits import Admission
from opsin.server.model import ServedModel
from opsin.server.params import check_model, choices, sampling, top_logprobs, wants_usage
from opsin.server.replies import LEAST_LOGPROB, ChoicesWriter, extensions, finish_reason
from opsin.server.schema import CompletionRequest

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue a text as it is, without a chat template."""

    async def prepare(model: ServedModel) -> Job:
        admission: Admission = request.state.admission
        return await admission.admit(_job(body, model, request.app.state.context))

    return CompletionHandler(request, prepare)


def _job(body: CompletionRequest, model: ServedModel, context: Context) -> Job:
    settings = context.settings
    check_model(body.model, model, settings)
    at_most(settings.max_prompt_chars, sum(map(len, body.prompt)), "characters", "prompt")
    at_most(settings.max_n, len(body.prompt) * (body.n or 1), "answers (prompts times n)", "prompt")
    logprobs = top_logprobs(body.logprobs, settings, "logprobs")
    params = sampling(body, settings, "max_tokens", body.max_tokens, logprobs=logprobs)
    each = choices(params, body.n, settings)
    prompts = [Prompt((TextPart(_whole_unicode(text)),)) for text in body.prompt]
    writer = TextWriter(model.name, logprobs=logprobs is not None, include_usage=wants_usage(body))
    return Job([(prompt, one) for prompt in prompts for one in each], writer, bool(body.stream))


def _whole_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadField("prompt has half a character (a lone surrogate): send whole Unicode text.", "prompt") from None
    return text


class TextWriter(ChoicesWriter):
    """Writes the answers to one request."""

    kind, chunk_kind, id_prefix, one_prompt = "text_completion", "text_completion", "cmpl", False

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, logprobs=logprobs, include_usage=include_usage)
        self._lengths: dict[int, int] = {}

    def begin(self) -> bytes:
        """Nothing: a stream starts with the first text."""
        return b""

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice. Reasoning is text like any other here: no template separated it."""
        if isinstance(event, Finished):
            self._answers[index] = event.answer
            last = self._choice(index, "", (), finish_reason(event.answer))
            return self._chunk(choices=[last], **extensions(event.answer))
        return self._chunk(choices=[self._choice(index, event.text, event.logprobs, None)])

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See ChoicesWriter."""
        return self._choice(index, answer.text, answer.logprobs, finish_reason(answer))

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        told = _older_logprobs(logprobs, offset) if self._logprobs and logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def _older_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    pieces = [one.piece.decode("utf-8", "replace") for one in logprobs]
    return {
        "tokens": pieces,
        "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in logprobs],
        "top_logprobs": [
            {piece.decode("utf-8", "replace"): max(value, LEAST_LOGPROB) for _, piece, value in one.top}
            for one in logprobs
        ],
        "text_offset": list(itertools.accumulate(map(len, pieces[:-1]), initial=offset)),
    }
