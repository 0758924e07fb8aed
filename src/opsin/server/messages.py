"""POST /v1/messages and /v1/messages/count_tokens: conversations in Anthropic's shape."""

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta, Usage
from opsin.server import schema
from opsin.server.blocks import MessagesRequest, conversation
from opsin.server.chat import build_prompt
from opsin.server.counting import CountHandler
from opsin.server.errors import ANTHROPIC_RESPONSES, anthropic_error
from opsin.server.handler import Asked, CompletionHandler, ModelManager, Writer, extensions
from opsin.server.images import RequestImages
from opsin.server.tools import CallReader, plan_tools

_SIGNATURE = "opsin"
"""Clients expect one behind thoughts, and send it back."""
_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
_DELTAS["tool_use"] = ("input_json_delta", "partial_json")

router = APIRouter(tags=["Anthropic"], responses=ANTHROPIC_RESPONSES)


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation of texts, images, calls of tools and their results, in Anthropic's shape."""
    return CompletionHandler(request, body, _prepare)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: MessagesRequest, request: Request) -> Response:
    """Count the tokens that a request to /v1/messages would cost, with those of its images."""
    return CountHandler(request, body, _prepare)


async def _prepare(body: MessagesRequest, model: ModelManager, images: RequestImages) -> tuple[Asked, Writer]:
    settings, choice = model.settings, body.tool_choice
    tools = plan_tools(body.tools or (), choice.chosen if choice else None, model.prompts, settings)
    cannot = body.wants_thinking is True and not model.prompts.can_think
    if cannot:  # agents ask every model for thoughts
        body = body.model_copy(update={"thinking": None, "chat_template_kwargs": None})
    stops = tuple(filter(None, body.stop_sequences or ()))
    schema.at_most(settings.max_stop, len(stops), "strings", "stop_sequences")
    wanted = body.output_config.format if body.output_config else None
    params = schema.sampling(body, settings, body.max_tokens, wanted, tools.schema if tools else None, stop=stops)
    writer = _MessageWriter(model.name, stops, CallReader(tools) if tools else None)
    writer.one_call = bool(choice and choice.disable_parallel_tool_use)
    writer.ignored = ("thinking",) if cannot else ()
    return [(await build_prompt(body, conversation(body), tools, model, images), params)], writer


def _frame(kind: str, **rest: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + schema.dumps({"type": kind, **rest}) + b"\n\n"


class _MessageWriter(Writer):
    """Writes the answer to one request: one object, or events in Anthropic's order.

    With `one_call` only the first call of the answer is told.
    """

    waiting = _frame("ping")
    one_call = False

    def __init__(self, model: str, stops: Sequence[str], reader: CallReader | None) -> None:
        self._base = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._reader, self._stops = reader, stops
        self._blocks: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []

    def begin(self) -> bytes:
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(Usage())}
        return _frame("message_start", message=self._base | nothing) + self.waiting  # the counts come at the end

    def event(self, index: int, event: TextDelta | Finished) -> bytes:  # noqa: ARG002 - there is one choice
        if isinstance(event, Finished):
            return self._finish(event.answer)
        if event.reasoning:
            return self._say("thinking", event.text)
        return self._say("text", self._reader.feed(event.text) if self._reader else event.text) + self._calls()

    def failed(self, status: int, body: dict[str, Any]) -> bytes:
        error = body["error"]
        return _frame("error", **anthropic_error(status, error["message"], error["code"]))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        # It is the result of a stream's events.
        (answer,) = answers
        self._say("thinking", answer.reasoning or "")
        self.event(0, TextDelta(answer.text))
        self._finish(answer)
        about = {"usage": _usage(answer.usage), **extensions(answer)}
        return {**self._base, "content": self._blocks, **self._end(answer), **about}

    def _finish(self, answer: Answer) -> bytes:
        frames = self._say("text", self._reader.finish() if self._reader else "") + self._calls() + self._close()
        about = {"usage": _usage(answer.usage), **extensions(answer)}
        return frames + _frame("message_delta", delta=self._end(answer), **about) + _frame("message_stop")

    def _end(self, answer: Answer) -> dict[str, str | None]:
        """Why the answer ended."""
        if self._reader is not None and self._reader.calls and not self._reader.cut:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if answer.finish_reason == "length":
            full = answer.limit == "context"
            return {"stop_reason": "model_context_window_exceeded" if full else "max_tokens", "stop_sequence": None}
        stop = answer.stop if answer.stop in self._stops else None  # the template may have some, too
        return {"stop_reason": "end_turn" if stop is None else "stop_sequence", "stop_sequence": stop}

    def _say(self, kind: str, text: str) -> bytes:
        """More text of a block; a new block if another kind is open. White space behind a call is none."""
        if not text or (self._reader and self._reader.calls and not text.strip()):
            return b""
        opened = b"" if self._open and self._open["type"] == kind else self._begin({"type": kind, kind: ""})
        return opened + self._more(text)

    def _calls(self) -> bytes:
        """What is new of the calls."""
        frames = b""
        for told in self._reader.take_told() if self._reader else ():
            if told["index"] and self.one_call:
                continue
            if "id" in told:
                made = {"id": told["id"].replace("call_", "toolu_"), "name": told["function"]["name"]}
                frames += self._begin({"type": "tool_use", **made, "input": {}})
            if piece := told["function"]["arguments"]:
                frames += self._more(piece)
        return frames

    def _begin(self, block: dict[str, Any]) -> bytes:
        frames = self._close()
        self._open = {**block, "signature": ""} if block["type"] == "thinking" else block
        return frames + _frame("content_block_start", index=len(self._blocks), content_block=self._open)

    def _more(self, piece: str) -> bytes:
        assert self._open is not None
        kind, key = _DELTAS[self._open["type"]]
        self._pieces.append(piece)
        return _frame("content_block_delta", index=len(self._blocks), delta={"type": kind, key: piece})

    def _close(self) -> bytes:
        """The end of the open block, if there is one."""
        block, at, frames = self._open, len(self._blocks), b""
        if block is None:
            return frames
        kind, said = block["type"], "".join(self._pieces)
        if kind == "tool_use":  # one that was cut has no arguments
            arguments = schema.loads(said)
            block["input"] = arguments if isinstance(arguments, dict) else {}
        else:
            block[kind] = said
        if kind == "thinking":
            block["signature"] = _SIGNATURE
            frames = _frame("content_block_delta", index=at, delta={"type": "signature_delta", "signature": _SIGNATURE})
        self._blocks.append(block)
        self._open, self._pieces = None, []
        return frames + _frame("content_block_stop", index=at)


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
