"""Answers as chat completions and completions write them, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.server.errors import dumps
from opsin.server.tools import CallReader, ToolPlan

_NOTHING = -9999.0
"""What stands for a probability of zero, whose logarithm JSON cannot write."""
DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def extensions(answer: Answer) -> dict[str, Any]:
    """What Opsin tells beyond OpenAI's fields: llama-server's timings, stages, pictures, the guard, what cut it."""
    return {
        "timings": asdict(answer.timings),
        "stages": answer.stages.as_dict(),
        "images": [asdict(image) for image in answer.images],
        "guard": None if answer.guard is None else asdict(answer.guard),
        "limit": answer.limit,
    }


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts of a request; choices of one prompt share it."""
    first = answers[0].usage
    completion = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens, "image_tokens": first.image_tokens},
    }


def reason(answer: Answer) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if answer.finish_reason == "length" else "stop"


def token_logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities as chat completions and responses write them."""
    return [
        {
            **_token(one.piece, one.logprob),
            "top_logprobs": [_token(piece, value) for _, piece, value in one.top],
        }
        for one in logprobs
    ]


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, _NOTHING), "bytes": list(piece)}


def _about(answers: Sequence[Answer], index: int) -> dict[str, Any]:
    """Where there are several choices each tells its own account."""
    return extensions(answers[index]) if len(answers) > 1 else {}


@dataclass(slots=True)
class Heading:
    """What every object of an answer begins with."""

    model: str
    kind: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __call__(self, kind: str = "", **rest: Any) -> dict[str, Any]:
        """An object with these fields in front."""
        return {"id": self.id, "object": self.kind + kind, "created": self.created, "model": self.model, **rest}


class ChatWriter:
    """Writes one request's answers for POST /v1/chat/completions."""

    def __init__(self, model: str, n: int, tools: ToolPlan, *, logprobs: bool, include_usage: bool) -> None:
        self._heading = Heading(model, "chat.completion", f"chatcmpl-{uuid.uuid4().hex}")
        self._tools = tools
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._readers: list[CallReader | None] = [tools.reader() for _ in range(n)]
        self._answers: dict[int, Answer] = {}

    def begin(self) -> bytes:
        """The role of each choice."""
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, role) for index in range(len(self._readers)))

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice with its calls."""
        if isinstance(event, Finished):
            return self._finish(index, event.answer)
        if event.reasoning:
            return self._chunk(index, {"reasoning_content": event.text}, event.logprobs)
        reader = self._readers[index]
        text = event.text if reader is None else reader.feed(event.text)
        if not text and not (self._logprobs and event.logprobs):
            return b""
        return self._chunk(index, {"content": text}, event.logprobs)

    def end(self) -> bytes:
        """The counts, where they were asked for, and the mark of the end."""
        if not self._include_usage:
            return DONE
        answers = [self._answers[index] for index in sorted(self._answers)]
        return frame(self._heading(".chunk", choices=[], usage=usage(answers), **extensions(answers[0]))) + DONE

    def failed(self, body: dict[str, Any]) -> bytes:
        """The error as an event; no mark of the end follows it."""
        return frame(body)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object."""
        choices = [self._choice(index, answers) for index in range(len(answers))]
        return self._heading(choices=choices, usage=usage(answers), **extensions(answers[0]))

    def _choice(self, index: int, answers: Sequence[Answer]) -> dict[str, Any]:
        answer, reader = answers[index], self._tools.reader()
        text, calls = answer.text, []
        if reader is not None:
            text = (reader.feed(text) + reader.finish()).strip()
            calls = reader.calls
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = [call.as_dict() for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._told(answer.logprobs),
            "finish_reason": "tool_calls" if calls else reason(answer),
            **_about(answers, index),
        }

    def _finish(self, index: int, answer: Answer) -> bytes:
        self._answers[index] = answer
        frames, calls = [], []
        if (reader := self._readers[index]) is not None:
            if text := reader.finish():
                frames.append(self._chunk(index, {"content": text}))
            calls = reader.calls
        for number, call in enumerate(calls):
            frames.append(self._chunk(index, {"tool_calls": [{"index": number, **call.as_dict()}]}))
        why = "tool_calls" if calls else reason(answer)
        return b"".join((*frames, self._chunk(index, {}, why=why, **extensions(answer))))

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        why: str | None = None,
        **rest: Any,
    ) -> bytes:
        told = self._told(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": why}
        return frame(self._heading(".chunk", choices=[choice], **rest))

    def _told(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": token_logprobs(logprobs), "refusal": None} if self._logprobs else None


class TextWriter:
    """Writes one request's answers for POST /v1/completions."""

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._heading = Heading(model, "text_completion", f"cmpl-{uuid.uuid4().hex}")
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._answers: dict[int, Answer] = {}
        self._lengths: dict[int, int] = {}

    def begin(self) -> bytes:
        """Nothing: the first text comes first."""
        return b""

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice."""
        if isinstance(event, Finished):
            self._answers[index] = event.answer
            choice = self._choice(index, "", (), reason(event.answer))
            return frame(self._heading(choices=[choice], **extensions(event.answer)))
        # Thoughts are text like any other here: no template has told them apart.
        return frame(self._heading(choices=[self._choice(index, event.text, event.logprobs, None)]))

    def end(self) -> bytes:
        """The counts, where they were asked for, and the mark of the end."""
        if not self._include_usage:
            return DONE
        answers = [self._answers[index] for index in sorted(self._answers)]
        return frame(self._heading(choices=[], usage=_summed(answers), **extensions(answers[0]))) + DONE

    def failed(self, body: dict[str, Any]) -> bytes:
        """The error as an event."""
        return frame(body)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object."""
        choices = [
            self._choice(index, answer.text, answer.logprobs, reason(answer)) | _about(answers, index)
            for index, answer in enumerate(answers)
        ]
        return self._heading(choices=choices, usage=_summed(answers), **extensions(answers[0]))

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], why: str | None) -> dict[str, Any]:
        told = None
        if self._logprobs and logprobs:
            told = _older_logprobs(logprobs, self._lengths.get(index, 0))
        self._lengths[index] = self._lengths.get(index, 0) + len(text)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": why}


def _summed(answers: Sequence[Answer]) -> dict[str, Any]:
    """Token counts where each choice may have a prompt of its own."""
    counts = usage(answers)
    counts["prompt_tokens"] = sum(answer.usage.prompt_tokens for answer in answers)
    counts["total_tokens"] = counts["prompt_tokens"] + counts["completion_tokens"]
    counts["prompt_tokens_details"]["cached_tokens"] = sum(answer.usage.cached_tokens for answer in answers)
    return counts


def _older_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    pieces = [one.piece.decode("utf-8", "replace") for one in logprobs]
    offsets = [offset + sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return {
        "tokens": pieces,
        "token_logprobs": [max(one.logprob, _NOTHING) for one in logprobs],
        "top_logprobs": [
            {piece.decode("utf-8", "replace"): max(value, _NOTHING) for _, piece, value in one.top} for one in logprobs
        ],
        "text_offset": offsets,
    }
