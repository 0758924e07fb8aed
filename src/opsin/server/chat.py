"""POST /v1/chat/completions and /v1/completions: answers that consist of choices."""

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from opsin.boxes import check_boxes
from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.errors import BadParameter
from opsin.core.image_options import ImageOptions, options_of
from opsin.core.request import Image, Prompt, TextPart
from opsin.core.settings import VideoSettings
from opsin.images.source import show
from opsin.images.video import as_frames
from opsin.prompt import Content, Message
from opsin.server import schema
from opsin.server.counting import CountHandler
from opsin.server.errors import BadField
from opsin.server.handler import Asked, CompletionHandler, ModelManager, Writer, extensions
from opsin.server.images import RequestImages, Wanted
from opsin.server.parts import FilePartIn, ImagePartIn, TextPartIn, VideoPartIn
from opsin.server.tools import CallReader, ToolPlan, plan_tools

_ROLES: dict[str, Any] = {"developer": "system", "function": "tool"}
_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: schema.ChatRequest, request: Request) -> Response:
    """Answer a conversation of texts and images."""
    return CompletionHandler(request, body, _prepare_chat)


@router.post("/v1/chat/completions/input_tokens")
async def count_chat(body: schema.ChatRequest, request: Request) -> Response:
    """Count the tokens that a chat completion's prompt would cost, with those of its images."""
    return CountHandler(request, body, _prepare_chat)


@router.post("/v1/completions")
async def completions(body: schema.CompletionRequest, request: Request) -> Response:
    """Continue a text as it is, without a chat template."""
    return CompletionHandler(request, body, _prepare_text)


async def _prepare_chat(body: schema.ChatRequest, model: ModelManager, images: RequestImages) -> tuple[Asked, Writer]:
    settings = model.settings
    wanted = body.tools or body.tool_choice
    tools = plan_tools(body.tools or (), body.tool_choice, model.prompts, settings) if wanted else None
    top, shown = body.top_logprobs or body.n_probs or 0, body.logprobs or bool(body.n_probs)
    schema.at_most(settings.max_top_logprobs, top, "alternatives", "top_logprobs")
    if top and not shown:
        raise BadField("top_logprobs needs logprobs: set it to true.", "top_logprobs")
    params = schema.sampling(
        body,
        settings,
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        body.response_format or body.json_schema,
        tools.schema if tools else None,
        logprobs=top if shown else None,
    )
    each = schema.choices(body, params, settings, tools=tools is not None)
    writer = _ChatWriter(model.name, body, [CallReader(tools) if tools else None for _ in each])
    prompt = await build_prompt(body, body.messages, tools, model, images)
    return [(prompt, one) for one in each], writer


async def _prepare_text(body: schema.CompletionRequest, model: ModelManager, _: RequestImages) -> tuple[Asked, Writer]:
    settings = model.settings
    schema.at_most(settings.max_prompt_chars, sum(map(len, body.prompt)), "characters", "prompt")
    schema.at_most(settings.max_n, len(body.prompt) * (body.n or 1), "answers (prompts times n)", "prompt")
    top = body.n_probs if body.logprobs is None else body.logprobs
    schema.at_most(settings.max_top_logprobs, top or 0, "alternatives", "logprobs")
    wanted = body.response_format or body.json_schema
    each = schema.choices(body, schema.sampling(body, settings, body.max_tokens, wanted, logprobs=top), settings)
    prompts = [Prompt((TextPart(text),), continues=True) for text in body.prompt]
    return [(prompt, one) for prompt in prompts for one in each], _TextWriter(model.name, body)


async def build_prompt(
    body: schema.Conversation,
    messages: Sequence[schema.MessageIn],
    tools: ToolPlan | None,
    model: ModelManager,
    images: RequestImages,
) -> Prompt:
    """The prompt of a conversation; its images are loaded side by side.

    Raises BadField for too many images or too much text, BadPrompt, and what loading an image raises.
    """
    wanted, count, characters = list[Wanted](), 0, 0
    parts = [part for message in messages for part in message.content or ()]
    most = model.settings.max_frames // max(1, sum(isinstance(part, VideoPartIn) for part in parts))
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content or ()):
            if isinstance(part, TextPartIn):
                characters += len(part.text)
                continue
            if isinstance(part, ImagePartIn):
                param = f"messages[{i}].content[{j}].image_url"
                shown = options_of(part, part.image_url, body)
                wanted.append(Wanted(part.image_url.url, shown, param, pages=part.pages))
                count += wanted[-1].options.count
            elif isinstance(part, FilePartIn):
                param, name = f"messages[{i}].content[{j}].file", show(part.filename)
                wanted.append(Wanted(part.address, options_of(part, body), param, name=name, pages=part.pages))
                count += wanted[-1].options.count
            else:
                wanted += _of_video(part, options_of(part, body), f"messages[{i}].content[{j}].{part.type}", most)
                count += 1
        characters += len(message.reasoning_content or "")
        characters += sum(len(call.function.arguments) for call in message.tool_calls or ())
    schema.at_most(model.settings.max_images, count, "images", "messages")
    schema.at_most(model.settings.max_prompt_chars, characters, "characters", "messages")
    if body.boxes:
        try:
            check_boxes(model.facts.info, len(wanted))
        except BadParameter as error:
            raise BadField(str(error), "boxes") from None
    loaded = iter(await images.load(wanted))
    conversation = [_message(message, loaded) for message in messages]
    # In a thread: the template of an unknown model may take its time.
    return await asyncio.to_thread(
        model.prompts.build,
        tools.messages(conversation) if tools else conversation,
        tools=tools.told if tools else None,
        thinking=body.wants_thinking,
        options=body.chat_template_kwargs,
    )


def _of_video(part: VideoPartIn, shown: ImageOptions, param: str, most: int) -> list[Wanted]:
    """A video as one file, of at most so many frames, or each of its frames. Raises BadField."""
    if shown.tiles:
        raise BadField("Tiles are for images, not for the frames of a video: leave out image_tiles.", param)
    schema.at_most(most, len(part.addresses) if part.is_listed else part.max_frames or 0, "frames", param)
    if part.is_listed:
        return [Wanted(url, shown, param) for url in part.addresses]
    chosen = part.model_dump(include={"fps", "max_frames"}, exclude_none=True)
    default = {"max_frames": max(1, min(most, VideoSettings().max_frames))}
    return [Wanted(part.address, shown, param, VideoSettings(**default | chosen))]


def _message(message: schema.MessageIn, images: Iterator[list[Image]]) -> Message:
    content: list[Content] = []
    for part in message.content or ():
        if isinstance(part, VideoPartIn) and part.is_listed:
            content += as_frames([image for _ in part.addresses for image in next(images)], part.max_frames)
        else:
            content += [part.text] if isinstance(part, TextPartIn) else next(images)
    calls = [call.model_dump() for call in message.tool_calls or ()]
    for call in calls:
        arguments = schema.loads(call["function"]["arguments"])
        if isinstance(arguments, dict) and not schema.is_deep(arguments):
            call["function"]["arguments"] = arguments  # templates want an object
    return Message(
        _ROLES.get(message.role, message.role),
        content or "",
        reasoning=message.reasoning_content,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


class _ChoicesWriter(Writer):
    def __init__(self, model: str, body: schema.Choices, prefix: str, kind: str, chunk_kind: str) -> None:
        self._kind = kind
        self._same = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": chunk_kind,
            "created": int(time.time()),
            "model": model,
        }
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
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
    def __init__(self, model: str, body: schema.ChatRequest, readers: Sequence[CallReader | None]) -> None:
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
        reader = self._readers[index]
        text = reader.feed(event.text) if reader else event.text
        said = self._said(index, text, event.logprobs) if text or event.logprobs else b""
        return said + self._calls(index, reader) if reader else said

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        return self._delta(index, {"content": text}, logprobs)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        reader = self._readers[index]
        text = reader.feed(answer.text) + reader.finish() if reader else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if reader and reader.calls:
            message |= {"content": text.strip() or None, "tool_calls": reader.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": _token_logprobs(answer.logprobs),
            "finish_reason": _finish_reason(answer, reader),
        }

    def _finish(self, index: int, answer: Answer) -> bytes:
        reader, said = self._readers[index], b""
        if reader:
            rest = reader.finish()
            said = (self._said(index, rest) if rest else b"") + self._calls(index, reader)
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": _finish_reason(answer, reader)}
        return said + self._chunk(last, **extensions(answer))

    def _calls(self, index: int, reader: CallReader) -> bytes:
        return b"".join([self._delta(index, {"tool_calls": [told]}) for told in reader.take_told()])

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


def _finish_reason(answer: Answer, reader: CallReader | None = None) -> str:
    if reader is not None and reader.calls and not reader.cut:
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
