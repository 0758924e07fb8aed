"""The plain Python API: open a model, ask about images, read whole answers or streams."""

import asyncio
import atexit
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Answer, parsed
from opsin.core.config import checked, current_folder, read_config, settle_old
from opsin.core.errors import BadParameter, OpsinError
from opsin.core.image_options import ImageOptions
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Image, Prompt, SamplingParams
from opsin.core.settings import RENAMED, RETIRED, EngineSettings, ImageSettings, VideoSettings
from opsin.engine import AnswerStream, Engine
from opsin.images import load_image
from opsin.models import locate
from opsin.prompt import Message, PromptBuilder
from opsin.worker import WorkerEngine
from opsin.worker.decoders import check_videos, join, load_source

Images = object | Sequence[object]
Tools = list[dict[str, Any]] | None


_OF_PAGES = ("pages", "max_pages")
_OF_VIDEOS = ("frames", "fps", "max_frames")
_LOADERS, _SLOTS = 4, 8  # threads that load images ahead; answers at the same time where nobody says how many


@dataclass(frozen=True, slots=True)
class Mapped:
    """What `map` gives for one element: the answer, with the value of JSON or a choice as `output`; or the `error`."""

    source: Images
    answer: Answer | None = None
    output: Any = None
    error: OpsinError | None = None

    @property
    def text(self) -> str | None:
        """The answer's text; None after an error."""
        return None if self.answer is None else self.answer.text


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
        self._slots = settings.parallel
        self.is_demo, self.setup = runtime.is_demo, runtime.setup
        # An engine that still computes while the process ends would end it with an abort.
        atexit.register(self._runtime.close)

    def image(self, source: object, **shown: Any) -> Image:
        """Read and check an image: path, address, bytes, PIL image, array, or an image that was read before.

        `shown` are the fields of ImageOptions: `region` as "10%,20%,50%,50%" (left, top, width, height) is the part of
        it that the model sees, `max_tokens` in how many tokens. Raises BadImage, FetchFailed, BadParameter.
        """
        cut, rest = checked(ImageOptions, shown).split()
        read = load_image(source, self._image_settings, cut)  # the whole file, whatever the model sees of it
        return load_image(read, self._image_settings, rest, self.engine.limits.images)

    def images(self, source: object, *, frames: bool = False, **reading: Any) -> list[Image]:
        """Read what `image` reads, the frames of a video, or the pages of a PDF, for messages of one's own.

        `reading` are `fps` (1) and `max_frames` (16), and the fields of ImageOptions: behind an image come its `tiles`
        ("2x2"), row by row. `frames` reads an animation (GIF, APNG) as a video, too. `pages` chooses pages of a PDF or
        a TIFF, as "1-3,7"; of a PDF without it all are read, up to `max_pages` (20). Notes of the first image name what
        was left out. Raises BadImage, FetchFailed, BadParameter.
        """
        pages = {name: reading.pop(name) for name in _OF_PAGES if name in reading}
        settings: ImageSettings = checked(ImageSettings, {**self._image_settings.model_dump(), **pages})
        shown = {name: reading.pop(name) for name in ImageOptions.model_fields if name in reading}
        options, video = checked(ImageOptions, shown), checked(VideoSettings, reading)
        read = load_source(source, settings, video, options, lambda: self.engine.limits.images, frames=frames)
        return [load_image(one, settings, options.split()[1], self.engine.limits.images) for one in read]

    def ask(self, images: Images, question: str, *, system: str | None = None, **params: Any) -> Answer:
        """Ask one question about one image, video or document, or several together, and wait for the whole answer.

        `params` are the fields of SamplingParams, `fps` and `max_frames` of videos, and `frames`: whether the images
        are frames of one video, in this order; `image_max_tokens`, `image_region` and `image_tiles` for all of the
        images, `pages` and `max_pages` for documents (see `images`). Raises BadInput, EngineError.
        """
        loaded = self._read(images, *_take_reading(params))
        return self.submit(question_about(loaded, question, system), **params).result()

    def _read(self, images: Images, reading: dict[str, Any], shown: dict[str, Any]) -> list[Image]:
        check_videos(_listed(images), **reading)
        return join([self.images(source, **reading, **shown) for source in _listed(images)], **reading)

    async def ask_async(self, images: Images, question: str, *, system: str | None = None, **params: Any) -> Answer:
        """`ask` for an event loop: images are read in threads, and nothing blocks. Cancelling it ends the answer.

        Raises BadInput, EngineError.
        """
        reading, shown = _take_reading(params)
        check_videos(_listed(images), **reading)
        read = (asyncio.to_thread(self.images, source, **reading, **shown) for source in _listed(images))
        loaded = join(await asyncio.gather(*read), **reading)
        return await self.submit(question_about(loaded, question, system), **params).answer()

    def map(
        self, images: Iterable[Images], question: str, *, schema: Any = None, system: str | None = None, **params: Any
    ) -> Iterator[Mapped]:
        """Ask one question about each of many images, as many at a time as there are slots; answers come in order.

        An element of `images` may be several images for one question, or a video. `schema` is a JSON schema: its text,
        a dict, or a pydantic model. A bad image is an answer with an error. Raises BadParameter, and EngineError if the
        engine dies.
        """
        if schema is not None:
            schema = schema.model_json_schema() if hasattr(schema, "model_json_schema") else schema
            params["json_schema"] = schema if isinstance(schema, str) else json.dumps(schema)
        reading, shown = _take_reading(params)
        has_value = checked(SamplingParams, params).has_value
        question_about((), question)

        def begin(sources: Images) -> AnswerStream:
            # No check for videos: where some elements are, others may be images.
            loaded = join([self.images(source, **reading, **shown) for source in _listed(sources)], **reading)
            return self.submit(question_about(loaded, question, system), **params)

        pending: deque[tuple[Images, Future[AnswerStream]]] = deque()
        with ThreadPoolExecutor(_LOADERS, "opsin-map") as threads:
            try:
                for sources in images:
                    pending.append((sources, threads.submit(begin, sources)))
                    if len(pending) > 2 * self._slots:
                        yield self._mapped(*pending.popleft(), has_value)
                while pending:
                    yield self._mapped(*pending.popleft(), has_value)
            finally:
                for _, begun in pending:
                    if not begun.cancel():
                        begun.add_done_callback(_leave)

    def _mapped(self, sources: Images, begun: Future[AnswerStream], constrained: bool) -> Mapped:
        try:
            answer = begun.result().result()
            return Mapped(sources, answer, parsed(answer) if constrained else None)
        except OpsinError as error:
            if self.engine.error is not None:
                raise
            return Mapped(sources, error=error)

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

    def count_tokens(self, images: Images, question: str, *, system: str | None = None, **params: Any) -> int:
        """The tokens of the prompt that `ask` would make, with those of its images, none of which is encoded.

        Raises BadInput, EngineError.
        """
        reading, shown = _take_reading(params)
        thinking = checked(SamplingParams, params).thinking
        loaded = self._read(images, reading, shown)
        prompt = self.prompt(question_about(loaded, question, system), thinking=thinking)
        return self.engine.submit(prompt, count_only=True).result().usage.prompt_tokens

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


def _leave(begun: Future[AnswerStream]) -> None:
    if begun.exception() is None:
        begun.result().cancel()


def map(images: Iterable[Images], question: str, *, schema: Any = None, **params: Any) -> Iterator[Mapped]:  # noqa: A001
    """Open the default model and ask about each of many images, eight at a time; see `Opsin.map`."""
    with Opsin(parallel=_SLOTS) as opsin:
        yield from opsin.map(images, question, schema=schema, **params)


def _open_isolated(model: str | Path | None, mmproj: str | Path | None, settings: EngineSettings) -> Runtime:
    engine = WorkerEngine(model, mmproj, settings)
    try:
        loaded = engine.wait_ready()
        # A worker is asked as an engine is.
        return Runtime(cast(Engine, engine), PromptBuilder(loaded.source), loaded.is_demo, loaded.setup)
    except BaseException:
        engine.close()
        raise


def _take_reading(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out what is said of videos, and of images and pages. Raises BadParameter."""
    reading = {name: params.pop(name) for name in _OF_VIDEOS if name in params}
    checked(VideoSettings, {name: value for name, value in reading.items() if name != "frames"})
    shown = {name: params.pop(f"image_{name}") for name in ImageOptions.model_fields if f"image_{name}" in params}
    checked(ImageOptions, shown)
    pages = {name: params.pop(name) for name in _OF_PAGES if name in params}
    checked(ImageSettings, pages)
    return reading, shown | pages


def _listed(images: object) -> Sequence[object]:
    return images if isinstance(images, (list, tuple)) else [images]


def question_about(images: Sequence[Image], question: str, system: str | None = None) -> list[Message]:
    """The usual conversation: an optional system message, then images and question in one turn."""
    if not question.strip():
        raise BadParameter("The question is empty: ask something.")
    messages = [Message(role="system", content=system)] if system else []
    messages.append(Message(role="user", content=[*images, question]))
    return messages
