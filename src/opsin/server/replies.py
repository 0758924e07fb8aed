"""What the answers of the three APIs have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from opsin.core.answer import Answer, TokenLogprob
from opsin.server.errors import dumps

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""
_DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def extensions(answer: Answer) -> dict[str, Any]:
    """What Opsin adds to OpenAI's fields: llama-server's timings, stages, images, the guard, what cut the answer."""
    return {
        "timings": asdict(answer.timings),
        "stages": answer.stages.as_dict(),
        "images": [asdict(image) for image in answer.images],
        "guard": None if answer.guard is None else asdict(answer.guard),
        "limit": answer.limit,
    }


def finish_reason(answer: Answer) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if answer.finish_reason == "length" else "stop"


def token_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities as chat completions write them."""
    return [
        {**_token(one.piece, one.logprob), "top_logprobs": [_token(piece, value) for _, piece, value in one.top]}
        for one in logprobs
    ]


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(piece)}


class ChoicesWriter:
    """Base of the writers whose answers consist of choices: chat completions and completions."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]
    one_prompt: ClassVar[bool]
    """Whether all choices answer the same prompt, which is counted once."""

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._answers: dict[int, Answer] = {}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object. If there are several choices, each has its own extensions as well."""
        several = len(answers) > 1
        choices = [
            self.choice(index, answer) | (extensions(answer) if several else {}) for index, answer in enumerate(answers)
        ]
        return self._object(self.kind, choices=choices, usage=self._usage(answers), **extensions(answers[0]))

    def end(self) -> bytes:
        """The token counts, if they were asked for, and the end mark."""
        if not self._include_usage:
            return _DONE
        answers = [self._answers[index] for index in sorted(self._answers)]
        return self._chunk(choices=[], usage=self._usage(answers), **extensions(answers[0])) + _DONE

    def failed(self, body: dict[str, Any]) -> bytes:
        """The error as an event; no end mark follows it."""
        return frame(body)

    def _chunk(self, **rest: Any) -> bytes:
        return frame(self._object(self.chunk_kind, **rest))

    def _object(self, kind: str, **rest: Any) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, **rest}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        prompts = [answer.usage for answer in (answers[:1] if self.one_prompt else answers)]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        completion = sum(answer.usage.completion_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in prompts),
                "image_tokens": prompts[0].image_tokens,
            },
        }
