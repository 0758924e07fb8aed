"""The plain Python API: open a model, ask about images, read whole answers or streams."""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Answer
from opsin.core.config import checked, current_folder, read_config, settle_old
from opsin.core.errors import BadParameter
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Image, Prompt, SamplingParams
from opsin.core.settings import RENAMED, RETIRED, EngineSettings, ImageSettings
from opsin.engine import AnswerStream, Engine
from opsin.images import load_image
from opsin.models import locate
from opsin.prompt import Message, PromptBuilder
from opsin.worker import WorkerEngine

Images = object | Sequence[object]
Tools = list[dict[str, Any]] | None


class Opsin:
    """A loaded pair of language model and projector.

    `model` is a GGUF file, a folder that holds a pair, or a known name; without one the default model is used, or the
    demo model. `options` are the fields of EngineSettings; what is not given comes from the environment and from
    opsin.toml (of the current folder, or else the user's), or from the file that `config` names; with False from
    neither. With `isolated` the model runs in a process of its own: when llama.cpp crashes, requests fail with
    EngineDied and a new process is started. Raises ModelError, BadParameter.

    `engine` takes `Prompt`s of one's own, and is closed with this object. `info` names the pair, `load_ms` is what
    loading took, and `is_demo` says that this is the demo model, which knows drawn scenes only. `setup` names files,
    settings and library in one word: what was proved for it holds for it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        mmproj: str | Path | None = None,
        *,
        image_settings: ImageSettings | None = None,
        config: bool | str | Path = True,
        isolated: bool = False,
        **options: Any,
    ) -> None:
        self._image_settings = image_settings or ImageSettings(fetch=True)
        old = {name: (options.pop(name), "option of Opsin") for name in (*RETIRED, *RENAMED) if name in options}
        settle_old(old)
        options |= {name: value for name, (value, _) in old.items()}
        settings = checked(EngineSettings, options)
        if config is not False:
            options |= {name: value for name, value in (("model", model), ("mmproj", mmproj)) if value is not None}
            file, folder = None if config is True else Path(config), current_folder()
            found = read_config(options, os.environ, folder, file=file, locate=locate, parallel=settings.parallel)
            settings = found.engine()
            model, mmproj = settings.model, settings.mmproj
        self._runtime = runtime = (_open_isolated if isolated else open_runtime)(model, mmproj, settings)
        self.engine: Engine = runtime.engine
        self.info: ModelInfo = runtime.engine.info
        self.load_ms: float = runtime.engine.load_ms
        self.is_demo, self.setup = runtime.is_demo, runtime.setup
        # An engine that still computes while the process ends would end it with an abort.
        atexit.register(self._runtime.close)

    def image(self, source: object) -> Image:
        """Read and check an image: path, address, bytes, PIL image or array; an image is returned as it is.

        Raises BadImage or FetchFailed.
        """
        return load_image(source, self._image_settings)

    def ask(self, images: Images, question: str, *, system: str | None = None, **params: Any) -> Answer:
        """Ask one question about one image, or about several together, and wait for the whole answer.

        `params` are the fields of SamplingParams. Raises BadInput, EngineError.
        """
        loaded = [self.image(source) for source in _listed(images)]
        return self.submit(question_about(loaded, question, system), **params).result()

    async def ask_async(self, images: Images, question: str, *, system: str | None = None, **params: Any) -> Answer:
        """`ask` for an event loop: images are read in a thread, and nothing blocks. Cancelling it ends the answer.

        Raises BadInput, EngineError.
        """
        loaded = await asyncio.gather(*(asyncio.to_thread(self.image, source) for source in _listed(images)))
        return await self.submit(question_about(loaded, question, system), **params).answer()

    def submit(
        self, messages: Sequence[Message], *, tools: Tools = None, load_ms: float = 0.0, **params: Any
    ) -> AnswerStream:
        """Ask with a whole conversation, and read the answer as it comes: with `for`, or with `async for`.

        Never blocks. Raises BadInput, EngineError.
        """
        sampling = checked(SamplingParams, params)
        prompt = self.prompt(messages, tools=tools, thinking=sampling.thinking)
        return self.engine.submit(prompt, sampling, load_ms=load_ms)

    def prompt(self, messages: Sequence[Message], *, tools: Tools = None, thinking: bool | None = None) -> Prompt:
        """A conversation as the model's template writes it, ready for `engine.submit`. Raises BadPrompt."""
        return self._runtime.prompts.build(messages, tools=tools, thinking=thinking)

    def placement(self) -> Placement:
        """Prove where encoder and language model run, by running each once."""
        return self.engine.placement()

    def close(self) -> None:
        """Free everything; twice does no harm. Without it everything is freed when the process ends."""
        atexit.unregister(self._runtime.close)
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(images: Images, question: str, **params: Any) -> Answer:
    """Open the default model, ask once, close it. For more than one question keep an `Opsin`."""
    with Opsin() as opsin:
        return opsin.ask(images, question, **params)


def _open_isolated(model: str | Path | None, mmproj: str | Path | None, settings: EngineSettings) -> Runtime:
    engine = WorkerEngine(model, mmproj, settings)
    try:
        loaded = engine.wait_ready()
        # A worker is asked as an engine is.
        return Runtime(cast(Engine, engine), PromptBuilder(loaded.source), loaded.is_demo, loaded.setup)
    except BaseException:
        engine.close()
        raise


def _listed(images: object) -> Sequence[object]:
    return images if isinstance(images, (list, tuple)) else [images]


def question_about(images: Sequence[Image], question: str, system: str | None = None) -> list[Message]:
    """The usual conversation: an optional system message, then images and question in one turn."""
    if not question.strip():
        raise BadParameter("The question is empty: ask something.")
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=[*images, question]))
    return messages
