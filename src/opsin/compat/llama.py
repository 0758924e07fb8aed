"""`Llama` as llama-cpp-python's programs know it, for images: messages, tools and answers in OpenAI's shape."""

import os
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from opsin.compat.handlers import MTMDChatHandler, download
from opsin.compat.options import engine_options, real_seed, sampling_options
from opsin.compose import open_runtime
from opsin.core.answer import Answer, Finished, TextDelta, TokenLogprob
from opsin.core.config import checked
from opsin.core.errors import BadParameter, BadPrompt
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.engine import AnswerStream
from opsin.images import load_image
from opsin.prompt import Content, Message

Objects = Sequence[Mapping[str, Any]]
Logprobs = Sequence[TokenLogprob]
_IMAGES = ImageSettings(fetch=True)


class Llama:
    """A loaded model, with the projector of its chat handler.

    Options are llama-cpp-python's; `options.py` says which of them Opsin maps, accepts without effect on answers, or
    refuses by name. Without a chat handler the projector beside the model is used, if there is one. An answer without
    `max_tokens` ends after Opsin's own limit, and the guard ends one that repeats itself (`guard=False` in a call
    switches it off). Addresses of images are fetched. Raises ModelError, BadParameter.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        chat_handler: MTMDChatHandler | None = None,
        seed: int | None = None,
        last_n_tokens_size: int = 64,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        if chat_handler is not None and not isinstance(chat_handler, MTMDChatHandler):
            raise BadParameter(
                f"chat_handler is a {type(chat_handler).__name__}: give one of opsin.compat's handlers, or a subclass."
            )
        self.model_path = os.fspath(model_path)
        self.chat_handler = chat_handler
        self.verbose = verbose
        self._seed = real_seed(seed)
        self._last_n = last_n_tokens_size
        settings = {**engine_options(options), "verbose": verbose}
        if chat_handler is not None and not chat_handler.use_gpu:
            settings["mmproj_device"] = "none"
        projector, template = (chat_handler.clip_model_path, chat_handler.template) if chat_handler else (None, None)
        self._runtime = open_runtime(self.model_path, projector, checked(EngineSettings, settings), template=template)
        # At the end of the program, too: native memory is not left to the order in which modules go.
        self._close = weakref.finalize(self, self._runtime.close)

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None, **kwargs: Any) -> Self:
        """Download a model of a repository and load it; `filename` may be a pattern that fits one file.

        Raises ModelNotFound, DownloadFailed, BadParameter, and what loading raises.
        """
        return cls(model_path=download(repo_id, filename, kwargs), **kwargs)

    def create_chat_completion(
        self,
        messages: Objects,
        functions: Objects | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        tools: Objects | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        *,
        stream: bool = False,
        model: str | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation: a dict in OpenAI's shape, or with `stream` an iterator of chunks.

        A `tool_choice` that names a function makes the answer that function's arguments. Raises BadInput (an option,
        a message, an image that cannot be used), EngineError.
        """
        offered, tool = _read_tools(tools, tool_choice, functions, function_call)
        if tool is not None:
            # The answer is the function's arguments, whatever shape was asked for besides.
            schema = tool.get("parameters") or {"type": "object"}
            options |= {"response_format": {"type": "json_object", "schema": schema}, "grammar": None}
        sampling = checked(SamplingParams, sampling_options(options, seed=self._seed, last_n=self._last_n))
        conversation = [self._message(message) for message in messages]
        events = self._runtime.engine.submit(self._runtime.prompts.build(conversation, tools=offered), sampling)
        writer = _Writer(model or self.model_path, None if tool is None else str(tool["name"]))
        return writer.chunks(events) if stream else writer.whole(events)

    def n_ctx(self) -> int:
        """Tokens the context holds."""
        return self._runtime.engine.limits.n_ctx

    def n_vocab(self) -> int:
        """Tokens the model knows."""
        return self._runtime.engine.limits.n_vocab

    def set_seed(self, seed: int) -> None:
        """The seed of all answers that are not given one."""
        self._seed = real_seed(seed)

    def close(self) -> None:
        """Free everything; twice does no harm."""
        self._close()

    def _message(self, message: Mapping[str, Any]) -> Message:
        """A message with its images loaded, in the order that the handler's family wants. Raises BadPrompt."""
        if not isinstance(message, Mapping):
            raise BadPrompt(f"A message is a {type(message).__name__}: give a dict with role and content.")
        role: Any = message.get("role")
        handler, content = self.chat_handler, message.get("content") or ""
        parts = [content] if isinstance(content, str) else [self._part(part) for part in content]
        if handler is not None and role == "user" and handler.images_first:
            images: list[Content] = [part for part in parts if isinstance(part, Image)]
            text = "".join(part for part in parts if isinstance(part, str))
            parts = [*images, (handler.between if images else handler.between.lstrip()) + text]
        names = ("tool_calls", "tool_call_id", "name")
        return Message(role, parts, **{name: message.get(name) for name in names})

    def _part(self, part: Any) -> Content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            return str(part.get("text", ""))
        if kind != "image_url":
            raise BadPrompt(f"A part of a message has the type {kind!r}: use text or image_url.")
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, Mapping) else image
        if not isinstance(url, str):
            raise BadPrompt("An image_url part has no address: give {'image_url': {'url': …}}.")
        return load_image(url if self.chat_handler is None else self.chat_handler.load_image(url), _IMAGES)


def _read_tools(
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
class _Writer:
    """Writes one answer. `tool` is the function that the answer is the arguments of, None for text."""

    model: str
    tool: str | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, stream: AnswerStream) -> dict[str, Any]:
        """Wait for the answer. Raises its error."""
        answer = stream.result()
        message: dict[str, Any] = {"role": "assistant", **self._content(answer.text)}
        if answer.reasoning is not None and self.tool is None:
            message["reasoning_content"] = answer.reasoning
        counts = {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens}
        usage = {**counts, "total_tokens": sum(counts.values())}
        return {**self._object("chat.completion", "message", message, answer.logprobs, answer), "usage": usage}

    def chunks(self, stream: AnswerStream) -> Iterator[dict[str, Any]]:
        """The answer as it comes; leaving early cancels it. Raises its error."""
        try:
            yield self._chunk({"role": "assistant"} if self.tool is None else {"role": "assistant", "content": None})
            for event in stream:
                if isinstance(event, TextDelta):
                    delta = {"reasoning_content": event.text} if event.reasoning else self._content(event.text, index=0)
                    yield self._chunk(delta, event.logprobs)
                elif isinstance(event, Finished):
                    yield self._chunk({}, answer=event.answer)
        finally:
            if not stream.done:
                stream.cancel()

    def _content(self, text: str, **extra: Any) -> dict[str, Any]:
        """Text, or a call of the tool in OpenAI's newer and older form."""
        if self.tool is None:
            return {"content": text}
        call = {"name": self.tool, "arguments": text}
        tool_call = {**extra, "id": f"call__0_{self.tool}_{self.id}", "type": "function", "function": dict(call)}
        return {"content": None, "function_call": call, "tool_calls": [tool_call]}

    def _chunk(self, delta: Any, logprobs: Logprobs = (), answer: Answer | None = None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", "delta", delta, logprobs, answer)

    def _object(self, kind: str, name: str, said: Any, logprobs: Logprobs, answer: Answer | None) -> dict[str, Any]:
        reason: str | None = answer.finish_reason if answer else None
        if self.tool is not None and reason == "stop":  # arguments that were cut are no call
            reason = "tool_calls"
        told = {"content": [_token_of(one) for one in logprobs], "refusal": None} if logprobs else None
        choice = Choice({"index": 0, name: said, "logprobs": told, "finish_reason": reason})
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": [choice]}


def _token_of(one: TokenLogprob) -> dict[str, Any]:
    return {**_token(one.piece, one.logprob), "top_logprobs": [_token(piece, value) for _, piece, value in one.top]}


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "bytes": None, "logprob": logprob}
