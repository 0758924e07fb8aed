"""Answers as dicts of OpenAI's shape, whole or in chunks, as llama-cpp-python gives them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.engine import AnswerStream


class Choice(dict[str, Any]):
    """One choice. `choice["text"]` gives the message's text: an example of the peer's own README asks for it so."""

    def __missing__(self, key: str) -> Any:
        if key == "text":
            return self["message"]["content"]
        raise KeyError(key)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one answer. `tool` is the function that the answer is the arguments of, None for text."""

    model: str
    tool: str | None = None
    logprobs: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, stream: AnswerStream) -> dict[str, Any]:
        """Wait for the answer. Raises its error."""
        answer = stream.result()
        choice = Choice(
            index=0,
            message=self._message(answer),
            logprobs=_logprobs(answer.logprobs) if self.logprobs else None,
            finish_reason=self._reason(answer),
        )
        usage = answer.usage
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def chunks(self, stream: AnswerStream) -> Iterator[dict[str, Any]]:
        """The answer as it comes; leaving early cancels it. Raises its error."""
        try:
            yield self._chunk({"role": "assistant"} if self.tool is None else {"role": "assistant", "content": None})
            for event in stream:
                if isinstance(event, TextDelta):
                    logprobs = _logprobs(event.logprobs) if self.logprobs else None
                    yield self._chunk(self._delta(event), logprobs=logprobs)
                elif isinstance(event, Finished):
                    yield self._chunk({}, reason=self._reason(event.answer))
        finally:
            if not stream.done:
                stream.cancel()

    def _message(self, answer: Answer) -> dict[str, Any]:
        if self.tool is not None:
            return {"role": "assistant", "content": None, **self._call(answer.text)}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        return message

    def _delta(self, event: TextDelta) -> dict[str, Any]:
        if event.reasoning:
            return {"reasoning_content": event.text}
        if self.tool is None:
            return {"content": event.text}
        return {"role": None, "content": None, **self._call(event.text, index=0)}

    def _call(self, arguments: str, **extra: Any) -> dict[str, Any]:
        """A call of the tool, in OpenAI's newer and older form."""
        call = {"name": self.tool, "arguments": arguments}
        tool_call = {**extra, "id": f"call__0_{self.tool}_{self.id}", "type": "function", "function": dict(call)}
        return {"function_call": call, "tool_calls": [tool_call]}

    def _chunk(
        self, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
        }

    def _reason(self, answer: Answer) -> str:
        # Arguments that were cut are no call: who reads "tool_calls" would parse half a JSON text.
        return "tool_calls" if self.tool is not None and answer.finish_reason == "stop" else answer.finish_reason


def _logprobs(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": one.piece.decode("utf-8", "replace"),
                "bytes": None,
                "logprob": one.logprob,
                "top_logprobs": [
                    {"token": piece.decode("utf-8", "replace"), "bytes": None, "logprob": value}
                    for _, piece, value in one.top
                ],
            }
            for one in logprobs
        ],
        "refusal": None,
    }
