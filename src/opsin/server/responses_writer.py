"""Answers as the Responses API writes them: one object, or events in OpenAI's order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.sampling import SamplingParams
from opsin.server.errors import dumps
from opsin.server.replies import extensions
from opsin.server.responses_schema import ResponsesRequest
from opsin.server.tools import Call, ToolPlan


@dataclass(slots=True)
class _Open:
    """The output item that is being written: a message or thoughts."""

    kind: str
    id: str
    index: int
    text: list[str] = field(default_factory=list)

    @property
    def part_kind(self) -> str:
        return "output_text" if self.kind == "message" else "reasoning_text"

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": self.part_kind, "text": text}
        return {"type": self.part_kind, "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self.part(text)]
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status, "content": content}
        more: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return item | more

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}


class ResponsesWriter:
    """Writes the one answer of a request for POST /v1/responses."""

    def __init__(self, model: str, body: ResponsesRequest, params: SamplingParams, tools: ToolPlan) -> None:
        self._base = _base(model, body, params)
        self._reader = tools.reader()
        self._number = 0
        self._open: _Open | None = None
        self._output: list[dict[str, Any]] = []

    def begin(self) -> bytes:
        """The response exists, and is in progress."""
        return self._event("response.created", response=self._base) + self._event(
            "response.in_progress", response=self._base
        )

    def event(self, index: int, event: TextDelta | Finished) -> bytes:  # noqa: ARG002 - there is one choice
        """New text or thoughts, or the end of the answer."""
        if isinstance(event, Finished):
            return self._finish(event.answer)
        if event.reasoning:
            return self._say("reasoning", event.text)
        text = event.text if self._reader is None else self._reader.feed(event.text)
        return self._say("message", text) if text else b""

    def end(self) -> bytes:
        """Nothing: the last event says that it is the last."""
        return b""

    def failed(self, body: dict[str, Any]) -> bytes:
        """The response failed."""
        error = {"code": "server_error", "message": body["error"]["message"]}
        response = {**self._base, "status": "failed", "error": error, "output": self._output}
        return self._event("response.failed", response=response)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object: what the events of a stream come to."""
        answer = answers[0]
        if answer.reasoning is not None:
            self._say("reasoning", answer.reasoning)
        text = answer.text if self._reader is None else self._reader.feed(answer.text)
        if text:
            self._say("message", text)
        self._finish(answer)
        return self._ended(answer)

    def _finish(self, answer: Answer) -> bytes:
        cut = answer.finish_reason == "length"
        frames = []
        calls: list[Call] = []
        if self._reader is not None:
            if rest := self._reader.finish():
                frames.append(self._say("message", rest))
            calls = self._reader.calls
        if self._open is None and not self._output and not calls:
            frames.append(self._say("message", ""))
        frames.append(self._close("incomplete" if cut and not calls else "completed"))
        frames.extend(self._call(call) for call in calls)
        response = self._ended(answer)
        frames.append(self._event(f"response.{response['status']}", response=response))
        return b"".join(frames)

    def _ended(self, answer: Answer) -> dict[str, Any]:
        cut = answer.finish_reason == "length"
        usage = answer.usage
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
            **extensions(answer),
        }

    def _say(self, kind: str, text: str) -> bytes:
        frames = []
        if self._open is not None and self._open.kind != kind:
            frames.append(self._close("completed"))
        if self._open is None:
            prefix = "msg" if kind == "message" else "rs"
            self._open = item = _Open(kind, f"{prefix}_{uuid.uuid4().hex}", len(self._output))
            frames += [
                self._event("response.output_item.added", output_index=item.index, item=item.item("in_progress", None)),
                self._event("response.content_part.added", **item.place, part=item.part("")),
            ]
        item = self._open
        if text:
            item.text.append(text)
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            frames.append(self._event(f"response.{item.part_kind}.delta", **item.place, delta=text, **more))
        return b"".join(frames)

    def _close(self, status: str) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        text = "".join(item.text)
        more: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
        whole = item.item(status, text)
        self._output.append(whole)
        return (
            self._event(f"response.{item.part_kind}.done", **item.place, text=text, **more)
            + self._event("response.content_part.done", **item.place, part=item.part(text))
            + self._event("response.output_item.done", output_index=item.index, item=whole)
        )

    def _call(self, call: Call) -> bytes:
        index = len(self._output)
        item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.id, "name": call.name}
        whole = {**item, "arguments": call.arguments, "status": "completed"}
        self._output.append(whole)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        return (
            self._event("response.output_item.added", output_index=index, item=begun)
            + self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
            + self._event("response.output_item.done", output_index=index, item=whole)
        )

    def _event(self, kind: str, **rest: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._number, **rest}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + dumps(value) + b"\n\n"


def _base(model: str, body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What every state of a response has in common."""
    echoed = body.model_dump(include={"tools", "text", "metadata"}, by_alias=True, exclude_none=True)
    choice = body.tool_choice
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": echoed.get("metadata", {}),
        "model": model,
        "output": [],
        "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": echoed.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in echoed.get("tools", [])],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
