"""`Llama` as llama-cpp-python's programs know it, for images."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

from opsin.compat.chat import Objects, Writer, read_message, read_tools
from opsin.compat.handlers import MTMDChatHandler, download
from opsin.compat.options import engine_options, real_seed, sampling_options
from opsin.compose import open_runtime
from opsin.core.config import checked
from opsin.core.errors import BadParameter
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.images import load_image


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
        self._image_settings = ImageSettings(fetch=True)
        settings = {**engine_options(options), "verbose": verbose}
        if chat_handler is not None and not chat_handler.use_gpu:
            settings["mmproj_device"] = "none"
        self._runtime = open_runtime(
            self.model_path,
            None if chat_handler is None else chat_handler.clip_model_path,
            checked(EngineSettings, settings),
            template=None if chat_handler is None else chat_handler.template,
        )
        # At the end of the program, too: native memory is not left to the order in which modules go.
        self._close = weakref.finalize(self, self._runtime.close)

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None, **kwargs: Any) -> Llama:
        """Download a model of a repository and load it; `filename` may be a pattern that fits one file.

        Raises ModelNotFound, DownloadFailed, BadParameter, and what loading raises.
        """
        path = download(repo_id, filename, kwargs)
        return cls(model_path=path, **kwargs)

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
        offered, tool = read_tools(tools, tool_choice, functions, function_call)
        if tool is not None:
            # The answer is the function's arguments, whatever shape was asked for besides.
            schema = tool.get("parameters") or {"type": "object"}
            options |= {"response_format": {"type": "json_object", "schema": schema}, "grammar": None}
        sampling = checked(SamplingParams, sampling_options(options, seed=self._seed, last_n=self._last_n))
        conversation = [read_message(message, self.chat_handler, self._image) for message in messages]
        events = self._runtime.engine.submit(self._runtime.prompts.build(conversation, tools=offered), sampling)
        name = None if tool is None else str(tool["name"])
        writer = Writer(model or self.model_path, name, logprobs=sampling.logprobs is not None)
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

    def _image(self, url: str) -> Image:
        source: object = url if self.chat_handler is None else self.chat_handler.load_image(url)
        return load_image(source, self._image_settings)
