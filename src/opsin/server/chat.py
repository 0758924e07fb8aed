"""POST /v1/chat/completions and /v1/completions: answers that consist of choices."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.request import Image, Prompt, TextPart
from opsin.prompt import Content, Message
from opsin.server import schema
from opsin.server.errors import BadField
from opsin.server.handler import Asked, CompletionHandler, ModelManager, Writer, extensions
from opsin.server.images import RequestImages, Wanted

_OPENERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)|(?:\[TOOL_CALLS\]|<\|python_tag\|>)(.*)", re.DOTALL)
_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: schema.ChatRequest, request: Request) -> Response:
    """Answer a conversation of texts and images."""
    return CompletionHandler(request, body, _prepare_chat)


@router.post("/v1/completions")
async def completions(body: schema.CompletionRequest, request: Request) -> Response:
    """Continue a text as it is, without a chat template."""
    return CompletionHandler(request, body, _prepare_text)


async def _prepare_chat(body: schema.ChatRequest, model: ModelManager, images: RequestImages) -> tuple[Asked, Writer]:
    settings, choice = model.settings, body.tool_choice
    functions = [tool.function for tool in body.tools or ()]
    called = choice.function if isinstance(choice, schema.ToolIn) else choice
    tools = schema.plan_tools(functions, called, model.prompts, settings)
    top = body.top_logprobs or 0
    schema.at_most(settings.max_top_logprobs, top, "alternatives", "top_logprobs")
    if top and not body.logprobs:
        raise BadField("top_logprobs needs logprobs: set it to true.", "top_logprobs")
    params = schema.sampling(
        body,
        settings,
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=top if body.logprobs else None,
        json_schema=tools.schema or schema.schema_of(body.response_format, settings.max_schema_bytes),
        thinking=body.wants_thinking,
    )
    each = schema.choices(params, body.n, settings)
    writer = _ChatWriter(model.name, body, [CallReader(tools) for _ in each])
    prompt = await build_prompt(body, body.messages, tools, model, images)
    return [(prompt, one) for one in each], writer


async def _prepare_text(body: schema.CompletionRequest, model: ModelManager, _: RequestImages) -> tuple[Asked, Writer]:
    settings = model.settings
    schema.at_most(settings.max_prompt_chars, sum(map(len, body.prompt)), "characters", "prompt")
    schema.at_most(settings.max_n, len(body.prompt) * (body.n or 1), "answers (prompts times n)", "prompt")
    schema.at_most(settings.max_top_logprobs, body.logprobs or 0, "alternatives", "logprobs")
    params = schema.sampling(body, settings, body.max_tokens, logprobs=body.logprobs)
    each = schema.choices(params, body.n, settings)
    prompts = [Prompt((TextPart(text),)) for text in body.prompt]
    return [(prompt, one) for prompt in prompts for one in each], _TextWriter(model.name, body)


async def build_prompt(
    body: schema.Conversation,
    messages: Sequence[schema.MessageIn],
    tools: schema.ToolPlan,
    model: ModelManager,
    images: RequestImages,
) -> Prompt:
    """The prompt of a conversation; its images are loaded side by side.

    Raises BadField for too many images or too much text, BadPrompt, and what loading an image raises.
    """
    wanted, characters = [], 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content or ()):
            if isinstance(part, schema.ImagePartIn):
                param = f"messages[{i}].content[{j}].image_url"
                wanted.append(Wanted(part.image_url.url, part.detail or part.image_url.detail, param))
            else:
                characters += len(part.text)
        characters += len(message.reasoning_content or "")
        characters += sum(len(call.function.arguments) for call in message.tool_calls or ())
    schema.at_most(model.settings.max_images, len(wanted), "images", "messages")
    schema.at_most(model.settings.max_prompt_chars, characters, "characters", "messages")
    loaded = iter(await images.load(wanted))
    conversation = tools.messages([_message(message, loaded) for message in messages])
    # In a thread: the template of an unknown model may take its time.
    return await asyncio.to_thread(model.prompts.build, conversation, tools=tools.told, thinking=body.wants_thinking)


def _message(message: schema.MessageIn, images: Iterator[Image]) -> Message:
    content: list[Content] = [
        next(images) if isinstance(part, schema.ImagePartIn) else part.text for part in message.content or ()
    ]
    calls = [call.model_dump() for call in message.tool_calls or ()]
    for call in calls:
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(call["function"]["arguments"])
            if isinstance(arguments, dict) and not schema.is_deep(arguments):
                call["function"]["arguments"] = arguments  # templates want an object
    return Message(
        "system" if message.role == "developer" else message.role,
        content or "",
        reasoning=message.reasoning_content,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


class CallReader:
    """Takes an answer piece by piece and separates its text from its calls.

    Without tools all is text, and with a forced call the answer is one JSON object. Otherwise calls are looked for in
    the forms that models are trained on: JSON inside <tool_call> tags, a list after [TOOL_CALLS], and an answer that is
    a JSON object with the name of a known function. What turns out not to be a call is text. From the first sign of a
    call on, everything is held back until the end.
    """

    def __init__(self, tools: schema.ToolPlan) -> None:
        self._names = tools.names
        self._holds = tools.schema is not None
        self._held = ""
        self._said = False
        self.calls: list[dict[str, Any]] = []
        """The calls that were found, as chat completions write them."""

    def feed(self, text: str) -> str:
        """Take text; return what is certainly not part of a call."""
        if not self._names:
            return text
        self._held += text
        if self._holds or (not self._said and self._held.lstrip()[:1] in {"", "{"}):
            return ""
        start = min((at for tag in _OPENERS if (at := self._held.find(tag)) >= 0), default=-1)
        self._holds = start >= 0
        if not self._holds:
            start = len(self._held) - _tail(self._held)
        text, self._held = self._held[:start], self._held[start:]
        self._said = self._said or bool(text.strip())
        return text

    def finish(self) -> str:
        """The answer is over: return what was held back and is not a call."""
        held, self._held = self._held, ""
        if not self._said and self._read(held):
            return ""
        text = _CALL.sub(lambda found: "" if self._read(found[1] or found[2] or "") else found[0], held)
        return text if text.strip() or not self.calls else ""

    def _read(self, text: str) -> bool:
        """Read calls from JSON text; False if it holds none, or anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        items = value if isinstance(value, list) else [value]
        if not items or not all(
            isinstance(item, Mapping) and isinstance(item.get("name"), str) and item["name"] in self._names
            for item in items
        ):
            return False
        for item in items:
            arguments = item.get("arguments", item.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = {"name": item["name"], "arguments": arguments}
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return True


def _tail(text: str) -> int:
    """How many characters at the end may be the start of a tag."""
    lengths = range(min(max(map(len, _OPENERS)) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(tag.startswith(text[-n:]) for tag in _OPENERS)), 0)


class _ChoicesWriter(Writer):
    def __init__(self, model: str, body: schema.Choices, prefix: str, kind: str, chunk_kind: str) -> None:
        self._kind = kind
        self._same = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": chunk_kind,
            "created": int(time.time()),
            "model": model,
        }
        options = body.stream_options
        if options is not None and not body.stream:
            raise BadField("stream_options needs stream: set it to true, or leave it out.", "stream_options")
        self._include_usage = options is not None and options.include_usage
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """The event for new text of a choice."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        # If there are several choices, each has its own extensions as well.
        several = len(answers) > 1
        choices = [self.choice(i, answer) | (extensions(answer) if several else {}) for i, answer in enumerate(answers)]
        usage = self._usage(answers)
        return {**self._same, "object": self._kind, "choices": choices, "usage": usage, **extensions(answers[0])}

    def end(self, answers: Sequence[Answer]) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._include_usage:
            return done
        return self._chunk(usage=self._usage(answers), **extensions(answers[0])) + done

    def _chunk(self, *choices: dict[str, Any], **rest: Any) -> bytes:
        return b"data: " + schema.dumps({**self._same, "choices": choices, **rest}) + b"\n\n"

    def _said(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """What `content` writes, but faster: without logprobs the events of a choice differ in their text alone."""
        if logprobs:
            return self.content(index, text, logprobs)
        if index not in self._around:
            before, _, after = self.content(index, "").rpartition(b'""')
            self._around[index] = before, after
        before, after = self._around[index]
        return before + schema.dumps(text) + after

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        # The choices of a chat have one prompt, which is counted once.
        prompts = [answer.usage for answer in (answers[:1] if isinstance(self, _ChatWriter) else answers)]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        completion = sum(answer.usage.completion_tokens for answer in answers)
        details = {
            "cached_tokens": sum(usage.cached_tokens for usage in prompts),
            "image_tokens": prompts[0].image_tokens,
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": details,
        }


class _ChatWriter(_ChoicesWriter):
    def __init__(self, model: str, body: schema.ChatRequest, readers: Sequence[CallReader]) -> None:
        super().__init__(model, body, "chatcmpl", "chat.completion", "chat.completion.chunk")
        self._readers = readers

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._delta(index, role) for index in range(len(self._readers)))

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        if isinstance(event, Finished):
            return self._finish(index, event.answer)
        if event.reasoning:
            return self._delta(index, {"reasoning_content": event.text}, event.logprobs)
        text = self._readers[index].feed(event.text)
        return self._said(index, text, event.logprobs) if text or event.logprobs else b""

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        return self._delta(index, {"content": text}, logprobs)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reader = self._readers[index]
        text = reader.feed(answer.text) + reader.finish()
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if reader.calls:
            message |= {"content": text.strip() or None, "tool_calls": reader.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": _token_logprobs(answer.logprobs),
            "finish_reason": _finish_reason(answer, reader.calls),
        }

    def _finish(self, index: int, answer: Answer) -> bytes:
        reader = self._readers[index]
        rest = reader.finish()
        frames = [self._said(index, rest)] if rest else []
        for number, call in enumerate(reader.calls):
            frames.append(self._delta(index, {"tool_calls": [{"index": number, **call}]}))
        reason = _finish_reason(answer, reader.calls)
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
        return b"".join((*frames, self._chunk(last, **extensions(answer))))

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        shown = _token_logprobs(logprobs)
        return self._chunk({"index": index, "delta": delta, "logprobs": shown, "finish_reason": None})


class _TextWriter(_ChoicesWriter):
    def __init__(self, model: str, body: schema.CompletionRequest) -> None:
        super().__init__(model, body, "cmpl", "text_completion", "text_completion")
        self._lengths: Counter[int] = Counter()

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        if isinstance(event, Finished):
            last = self._choice(index, "", (), _finish_reason(event.answer))
            return self._chunk(last, **extensions(event.answer))
        # Reasoning is text like any other here: no template separated it.
        return self._said(index, event.text, event.logprobs)

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        return self._chunk(self._choice(index, text, logprobs))

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._choice(index, answer.text, answer.logprobs, _finish_reason(answer))

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        offset = self._lengths[index]
        self._lengths[index] += len(text)
        shown = None
        if logprobs:
            pieces = [_text(one.piece) for one in logprobs]
            shown = {
                "tokens": pieces,
                "token_logprobs": [max(one.logprob, _LEAST_LOGPROB) for one in logprobs],
                "top_logprobs": [
                    {_text(piece): max(value, _LEAST_LOGPROB) for _, piece, value in one.top} for one in logprobs
                ],
                "text_offset": list(itertools.accumulate(map(len, pieces[:-1]), initial=offset)),
            }
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}


def _finish_reason(answer: Answer, calls: Sequence[Any] = ()) -> str:
    if calls:
        return "tool_calls"
    return "length" if answer.finish_reason == "length" else "stop"


def _token_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """What a chat shows of them; None where none were asked for."""
    content = [
        {**_token(one.piece, one.logprob), "top_logprobs": [_token(piece, value) for _, piece, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None} if content else None


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(piece)}
