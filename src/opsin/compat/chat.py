"""Messages and tools in OpenAI's shape to those of the prompt room, and answers back to that shape."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsin.compat.handlers import MTMDChatHandler
from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.errors import BadParameter, BadPrompt
from opsin.core.request import Image
from opsin.engine import AnswerStream
from opsin.prompt import Content, Message

Objects = Sequence[Mapping[str, Any]]
_EXTRAS = ("tool_calls", "tool_call_id", "name")


def read_message(message: Mapping[str, Any], handler: MTMDChatHandler | None, load: Callable[[str], Image]) -> Message:
    """A message with its images loaded, in the order that the handler's family wants. Raises BadPrompt."""
    if not isinstance(message, Mapping):
        raise BadPrompt(f"A message is a {type(message).__name__}: give a dict with role and content.")
    role: Any = message.get("role")
    content = message.get("content") or []
    parts = [content] if isinstance(content, str) else [_part(part, load) for part in content]
    if handler is not None and role == "user" and handler.images_first:
        images: list[Content] = [part for part in parts if isinstance(part, Image)]
        text = "".join(part for part in parts if isinstance(part, str))
        between = handler.between if images else handler.between.lstrip()
        parts = [*images, between + text]
    return Message(role, parts or "", **{name: message[name] for name in _EXTRAS if message.get(name) is not None})


def _part(part: Any, load: Callable[[str], Image]) -> Content:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return str(part.get("text", ""))
    if kind != "image_url":
        raise BadPrompt(f"A part of a message has the type {kind!r}: use text or image_url.")
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise BadPrompt("An image_url part has no address: give {'image_url': {'url': …}}.")
    return load(url)


def read_tools(
    tools: Objects | None,
    choice: str | Mapping[str, Any] | None,
    functions: Objects | None,
    call: str | Mapping[str, Any] | None,
) -> tuple[list[dict[str, Any]] | None, Mapping[str, Any] | None]:
    """The tools to offer, and the one function that must be called; also from OpenAI's older form. Raises BadParameter.

    At most one of the two: a function that must be called is not offered besides.
    """
    if functions is not None:
        tools = [{"type": "function", "function": dict(function)} for function in functions]
    if call is not None:
        choice = call if isinstance(call, str) else {"function": call}
    if choice == "required":
        raise BadParameter('tool_choice="required" is not supported: name the function that is to be called.')
    if not isinstance(choice, Mapping):
        return None if tools is None or choice == "none" else [dict(tool) for tool in tools], None
    name = choice.get("function", {}).get("name")
    named = [tool["function"] for tool in tools or () if tool.get("function", {}).get("name") == name]
    if not named:
        raise BadParameter(f"tool_choice names the function {name!r}, which is not among the tools.")
    return None, named[0]


class Choice(dict[str, Any]):
    """One choice. `choice["text"]` gives the message's text: an example of llama-cpp-python's README asks for it so."""

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
        message: dict[str, Any] = {"role": "assistant", **self._content(answer.text)}
        if answer.reasoning is not None and self.tool is None:
            message["reasoning_content"] = answer.reasoning
        choice = Choice(
            index=0, message=message, logprobs=self._logprobs(answer.logprobs), finish_reason=self._reason(answer)
        )
        counts = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
        usage = {**counts, "total_tokens": sum(counts.values())}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def chunks(self, stream: AnswerStream) -> Iterator[dict[str, Any]]:
        """The answer as it comes; leaving early cancels it. Raises its error."""
        try:
            yield self._chunk({"role": "assistant"} if self.tool is None else {"role": "assistant", "content": None})
            for event in stream:
                if isinstance(event, TextDelta):
                    yield self._chunk(self._delta(event), logprobs=self._logprobs(event.logprobs))
                elif isinstance(event, Finished):
                    yield self._chunk({}, reason=self._reason(event.answer))
        finally:
            if not stream.done:
                stream.cancel()

    def _delta(self, event: TextDelta) -> dict[str, Any]:
        if event.reasoning:
            return {"reasoning_content": event.text}
        role = {} if self.tool is None else {"role": None}
        return {**role, **self._content(event.text, index=0)}

    def _content(self, text: str, **extra: Any) -> dict[str, Any]:
        """Text, or a call of the tool in OpenAI's newer and older form."""
        if self.tool is None:
            return {"content": text}
        call = {"name": self.tool, "arguments": text}
        tool_call = {**extra, "id": f"call__0_{self.tool}_{self.id}", "type": "function", "function": dict(call)}
        return {"content": None, "function_call": call, "tool_calls": [tool_call]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _reason(self, answer: Answer) -> str:
        # Arguments that were cut are no call: who reads "tool_calls" would parse half a JSON text.
        return "tool_calls" if self.tool is not None and answer.finish_reason == "stop" else answer.finish_reason

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**_token(one.piece, one.logprob), "top_logprobs": [_token(piece, value) for _, piece, value in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "bytes": None, "logprob": logprob}
