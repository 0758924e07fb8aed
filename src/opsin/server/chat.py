"""POST /v1/chat/completions and /v1/completions: answers that consist of choices."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.request import Image, Prompt, TextPart
from opsin.prompt import Content, Message
from opsin.server.errors import BadField
from opsin.server.handler import CompletionHandler, Job, ServedModel, Writer, extensions
from opsin.server.images import RequestImages, Wanted
from opsin.server.schema import (
    ChatRequest,
    CompletionRequest,
    Conversation,
    FunctionIn,
    ImagePartIn,
    MessageIn,
    NamedFunction,
    NamedTool,
    at_most,
    choices,
    dumps,
    is_deep,
    sampling,
    schema_of,
    top_logprobs,
    wants_usage,
)
from opsin.server.tools import ToolPlan, plan_tools

_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation of texts and images."""
    return CompletionHandler(request, functools.partial(_chat_job, body))


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue a text as it is, without a chat template."""
    return CompletionHandler(request, functools.partial(_text_job, body))


async def _chat_job(body: ChatRequest, model: ServedModel, images: RequestImages) -> Job:
    settings = model.settings
    model.check(body.model)
    functions = [tool.function for tool in body.tools or ()]
    tools = plan(
        functions, body.tool_choice.function if isinstance(body.tool_choice, NamedTool) else body.tool_choice, model
    )
    top = top_logprobs(body.top_logprobs, settings, "top_logprobs")
    if top and not body.logprobs:
        raise BadField("top_logprobs needs logprobs: set it to true.", "top_logprobs")
    newer = body.max_completion_tokens is not None
    params = sampling(
        body,
        settings,
        "max_completion_tokens" if newer else "max_tokens",
        body.max_completion_tokens if newer else body.max_tokens,
        logprobs=(top or 0) if body.logprobs else None,
        json_schema=(tools and tools.schema) or schema_of(body.response_format, settings.max_schema_bytes),
        thinking=body.wants_thinking,
    )
    each = choices(params, body.n, settings)
    writer = ChatWriter(model.name, len(each), tools, logprobs=bool(body.logprobs), include_usage=wants_usage(body))
    prompt = await build_prompt(body, body.messages, tools, model, images)
    return Job([(prompt, one) for one in each], writer, bool(body.stream))


async def _text_job(body: CompletionRequest, model: ServedModel, _: RequestImages) -> Job:
    settings = model.settings
    model.check(body.model)
    at_most(settings.max_prompt_chars, sum(map(len, body.prompt)), "characters", "prompt")
    at_most(settings.max_n, len(body.prompt) * (body.n or 1), "answers (prompts times n)", "prompt")
    logprobs = top_logprobs(body.logprobs, settings, "logprobs")
    params = sampling(body, settings, "max_tokens", body.max_tokens, logprobs=logprobs)
    each = choices(params, body.n, settings)
    writer = TextWriter(model.name, logprobs=logprobs is not None, include_usage=wants_usage(body))
    prompts = [Prompt((TextPart(text),)) for text in body.prompt]
    return Job([(prompt, one) for prompt in prompts for one in each], writer, bool(body.stream))


def plan(functions: Sequence[FunctionIn], choice: str | NamedFunction | None, model: ServedModel) -> ToolPlan | None:
    """How tools are handled; None without any. Raises BadField."""
    if not functions and choice in (None, "none", "auto"):
        return None
    return plan_tools(functions, choice, model.prompts, model.settings)


async def build_prompt(
    body: Conversation,
    messages: Sequence[MessageIn],
    tools: ToolPlan | None,
    model: ServedModel,
    images: RequestImages,
) -> Prompt:
    """The prompt of a conversation; its images are loaded side by side.

    Raises BadField for too many images or too much text, BadPrompt, and what loading an image raises.
    """
    wanted, characters = [], 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content or ()):
            if isinstance(part, ImagePartIn):
                param = f"messages[{i}].content[{j}].image_url"
                wanted.append(Wanted(part.image_url.url, part.detail or part.image_url.detail, param))
            else:
                characters += len(part.text)
        characters += len(message.reasoning_content or "")
        characters += sum(len(call.function.arguments) for call in message.tool_calls or ())
    at_most(model.settings.max_images, len(wanted), "images", "messages")
    at_most(model.settings.max_prompt_chars, characters, "characters", "messages")
    loaded = iter(await images.load(wanted))
    conversation = [_message(message, loaded) for message in messages]
    told = None
    if tools is not None:
        conversation, told = tools.messages(conversation), tools.told
    # In a thread: the template of an unknown model may take its time.
    return await asyncio.to_thread(model.prompts.build, conversation, tools=told, thinking=body.wants_thinking)


def _message(message: MessageIn, images: Iterator[Image]) -> Message:
    content: list[Content] = [
        next(images) if isinstance(part, ImagePartIn) else part.text for part in message.content or ()
    ]
    calls = []
    for call in message.tool_calls or ():
        arguments: Any = call.function.arguments
        try:  # templates want an object
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict) and not is_deep(parsed):
            arguments = parsed
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    return Message(
        "system" if message.role == "developer" else message.role,
        content[0] if len(content) == 1 and isinstance(content[0], str) else content or "",
        reasoning=message.reasoning_content,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


class ChoicesWriter(Writer):
    """Base of the two writers below."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._same = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_kind,
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._answers: dict[int, Answer] = {}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer as one object. If there are several choices, each has its own extensions as well."""
        several = len(answers) > 1
        choices = [self.choice(i, answer) | (extensions(answer) if several else {}) for i, answer in enumerate(answers)]
        usage = self._usage(answers)
        return {**self._same, "object": self.kind, "choices": choices, "usage": usage, **extensions(answers[0])}

    def end(self) -> bytes:
        """The token counts, if they were asked for, and the end mark."""
        done = b"data: [DONE]\n\n"
        if not self._include_usage:
            return done
        answers = [self._answers[index] for index in sorted(self._answers)]
        return self._chunk(usage=self._usage(answers), **extensions(answers[0])) + done

    def _chunk(self, *choices: dict[str, Any], **rest: Any) -> bytes:
        """One server-sent event."""
        return b"data: " + dumps({**self._same, "choices": choices, **rest}) + b"\n\n"

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        # The choices of a chat have one prompt, which is counted once.
        prompts = [answer.usage for answer in (answers[:1] if isinstance(self, ChatWriter) else answers)]
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


class ChatWriter(ChoicesWriter):
    """Writes the answers to one request to /v1/chat/completions."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, n: int, tools: ToolPlan | None, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, logprobs=logprobs, include_usage=include_usage)
        self._readers = [None if tools is None else tools.reader() for _ in range(n)]
        self._around = [_around(self._delta(index, {"content": ""})) for index in range(n)]

    def begin(self) -> bytes:
        """The role of each choice."""
        role = {"role": "assistant", "content": ""}
        return b"".join(self._delta(index, role) for index in range(len(self._readers)))

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice with its calls."""
        if isinstance(event, Finished):
            return self._finish(index, event.answer)
        logprobs = self._token_logprobs(event.logprobs) if event.logprobs else None
        if event.reasoning:
            return self._delta(index, {"reasoning_content": event.text}, logprobs)
        reader = self._readers[index]
        text = event.text if reader is None else reader.feed(event.text)
        if logprobs is not None:
            return self._delta(index, {"content": text}, logprobs)
        before, after = self._around[index]
        return before + dumps(text) + after if text else b""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See ChoicesWriter."""
        reader = self._readers[index]
        text, calls = answer.text, []
        if reader is not None:
            text = (reader.feed(text) + reader.finish()).strip()
            calls = reader.calls
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = calls
        reason = "tool_calls" if calls else _finish_reason(answer)
        logprobs = self._token_logprobs(answer.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _finish(self, index: int, answer: Answer) -> bytes:
        self._answers[index] = answer
        frames, calls, reader = [], [], self._readers[index]
        if reader is not None:
            if text := reader.finish():
                frames.append(self._delta(index, {"content": text}))
            calls = reader.calls
        for number, call in enumerate(calls):
            frames.append(self._delta(index, {"tool_calls": [{"index": number, **call}]}))
        reason = "tool_calls" if calls else _finish_reason(answer)
        return b"".join((*frames, self._delta(index, {}, reason=reason, **extensions(answer))))

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None, **rest: Any
    ) -> bytes:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}, **rest)

    def _token_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**_token(one.piece, one.logprob), "top_logprobs": [_token(piece, value) for _, piece, value in one.top]}
            for one in logprobs
        ]
        return {"content": content, "refusal": None}


class TextWriter(ChoicesWriter):
    """Writes the answers to one request to /v1/completions."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(model, logprobs=logprobs, include_usage=include_usage)
        self._lengths: dict[int, int] = {}
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def event(self, index: int, event: TextDelta | Finished) -> bytes:
        """New text, or the end of a choice. Reasoning is text like any other here: no template separated it."""
        if isinstance(event, Finished):
            self._answers[index] = event.answer
            last = self._choice(index, "", (), _finish_reason(event.answer))
            return self._chunk(last, **extensions(event.answer))
        if self._logprobs:
            return self._chunk(self._choice(index, event.text, event.logprobs, None))
        if index not in self._around:
            self._around[index] = _around(self._chunk(self._choice(index, "", (), None)))
        before, after = self._around[index]
        return before + dumps(event.text) + after

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See ChoicesWriter."""
        return self._choice(index, answer.text, answer.logprobs, _finish_reason(answer))

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        shown = None
        if self._logprobs and logprobs:
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


def _around(chunk: bytes) -> tuple[bytes, bytes]:
    """What stands before and after the text of a chunk that has none: all of plain text are the same but for it."""
    before, _, after = chunk.rpartition(b'""')
    return before, after


def _finish_reason(answer: Answer) -> str:
    """OpenAI's word for why an answer ended."""
    return "length" if answer.finish_reason == "length" else "stop"


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(piece)}
