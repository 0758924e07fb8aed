"""What becomes of one row: its images are loaded, the question is asked, and a row of output comes back."""

import asyncio
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from opsin.core.image_options import AS_IT_IS, ImageOptions
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import ImageSettings
from opsin.jobs import load
from opsin.jobs.item import ImageRef, Item
from opsin.jobs.row import Row, answer_row, output_of
from opsin.jobs.template import PromptTemplate
from opsin.prompt import Message, PromptBuilder
from opsin.worker import DecoderPool, WorkerEngine, WorkerPool

_PIXEL_BYTES = 2**30
"""Pixels that wait for the engine; while there are more, no image is decoded."""


@dataclass(slots=True)
class Asked:
    """A row that is ready to be asked. `question` names text and pixels (None: it is asked in any case)."""

    item: Item
    question: bytes | None = None
    images: list[Image] = field(default_factory=list)
    text: str = ""


class Asker:
    """Prepares rows, and asks them. `slots` are how many are answered at the same time."""

    slots: int

    async def prepare(self, item: Item) -> Asked:
        """Load what the row needs: nothing, unless an asker says otherwise. Raises BadInput and its kinds."""
        return Asked(item)

    async def ask(self, asked: Asked) -> Row:
        """The answer as `--json` shows it. Raises BadInput, ConstraintFailed, and EngineError."""
        raise NotImplementedError

    def drop(self, asked: Asked) -> None:
        """What was loaded is not needed any more."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about each row, and how its images are loaded.

    `seconds` is what loading one image may take; `private` allows images from hosts that are not public. `images` say
    how they are shown.
    """

    template: PromptTemplate
    params: SamplingParams
    system: str | None = None
    limits: ImageSettings = field(default_factory=lambda: ImageSettings(fetch=True))
    seconds: float = 60.0
    private: bool = False
    images: ImageOptions = AS_IT_IS


class ImageAsker(Asker):
    """Asks about the images of each row; `processes` decode them, `about` goes into each answer's row."""

    def __init__(
        self,
        engine: WorkerEngine | WorkerPool,
        prompts: PromptBuilder,
        question: Question,
        *,
        processes: int,
        about: Row,
    ) -> None:
        self._engine, self._prompts, self._question, self._about = engine, prompts, question, about
        self.slots = engine.slots
        self._sizes = engine.limits.images
        self._pool = DecoderPool(question.seconds)
        self._threads = ThreadPoolExecutor(processes, "opsin-decode")
        self._waiting_bytes = 0
        self._room = asyncio.Event()
        self._room.set()

    async def prepare(self, item: Item) -> Asked:
        """See Asker."""
        await self._room.wait()
        metadata: dict[str, str] = {}
        template = self._question.template
        if template.metadata and item.images:
            metadata = await self._call(load.metadata, item.images[0])
        text = template.fill(item, metadata)
        loaded = await asyncio.gather(*(self._load(ref) for ref in item.images))
        images = [image for some in loaded for image in some]
        name = json.dumps([text, [image.sha256 for image in images]])
        return Asked(item, hashlib.sha256(name.encode()).digest()[:16], images, text)

    async def ask(self, asked: Asked) -> Row:
        """See Asker."""
        system, params = self._question.system, self._question.params
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", [*asked.images, asked.text]))
        prompt = self._prompts.build(messages, thinking=params.thinking)
        answer = await self._engine.submit(prompt, params, priority=-1).answer()
        return answer_row(answer) | self._about | ({"output": output_of(answer)} if params.has_value else {})

    def drop(self, asked: Asked) -> None:
        """Its pixels are not needed any more."""
        self._waiting_bytes -= sum(len(image.rgb) for image in asked.images)
        asked.images.clear()
        if self._waiting_bytes < _PIXEL_BYTES:
            self._room.set()

    def close(self) -> None:
        """End the processes that decode."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()

    async def _load(self, ref: ImageRef) -> list[Image]:
        images: list[Image] = await self._call(load.load, ref, self._question.images, self._sizes)
        self._waiting_bytes += sum(len(image.rgb) for image in images)
        if self._waiting_bytes >= _PIXEL_BYTES:
            self._room.clear()
        return images

    async def _call(self, work: Callable[..., Any], *values: Any) -> Any:
        question = self._question
        request = (work, *values, question.limits, question.private)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._pool.call, *request)


def thumbnail(images: Sequence[Image]) -> bytes | None:
    """A small JPEG of the first image, for the report."""
    from PIL import Image as Pil

    if not images:
        return None
    first, file = images[0], io.BytesIO()
    pixels: Any = first.rgb
    small = Pil.frombuffer("RGB", (first.width, first.height), pixels, "raw", "RGB", 0, 1)
    small.thumbnail((200, 200))
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
