"""The five workloads as data, the images they ask about, and what can run them."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opsin.core.answer import Usage
from opsin.core.errors import BadParameter, OpsinError

TOKENS = 32
IMAGE_SIZE = (640, 480)


class RequestFailed(OpsinError):
    """A server refused a question or broke off its answer."""

    code = "request_failed"


class Driver(Protocol):
    """Whatever answers questions about images: an engine in this process, or a server. Used by several threads."""

    def ask(self, image: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        """Ask about an image file: yields `time.perf_counter()` at each piece of text, and returns the token counts.

        Temperature 0, end tokens ignored, no guard: the answer has exactly `max_tokens` tokens.
        """


@dataclass(frozen=True, slots=True)
class Ask:
    """A question about one of the workload's images (`image` is an index), sent `at` seconds after the start."""

    image: int
    question: str = "what is this?"
    max_tokens: int = TOKENS
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions, sent one after another or (`at_once`) each at its time; of `stream` the answer is watched."""

    name: str
    title: str
    asks: tuple[Ask, ...]
    at_once: bool = False
    stream: int | None = None

    @property
    def images(self) -> int:
        """How many different images it takes."""
        return len({ask.image for ask in self.asks})


_QUESTIONS = (
    *("what is this?", "what colours are there?", "is it day or night?", "how many things are there?"),
    *("what is in front?", "where was it taken?", "what is on the left?", "is anybody there?"),
)
_STREAM = (Ask(0, max_tokens=96), *(Ask(i, max_tokens=8, at=at) for i, at in enumerate((0.5, 0.8, 1.1), start=1)))

WORKLOADS = (
    Workload("W1", "4 new images, one after another", tuple(Ask(i) for i in range(4))),
    Workload("W2", "6 questions about one image, one after another", tuple(Ask(0, q) for q in _QUESTIONS[:6])),
    Workload("W3", "8 questions about one new image, at once", tuple(Ask(0, q) for q in _QUESTIONS), at_once=True),
    Workload("W4", "8 new images, at once", tuple(Ask(i) for i in range(8)), at_once=True),
    Workload("W5", "a stream of 96 tokens while 3 new images arrive", _STREAM, at_once=True, stream=0),
)


def choose(names: Iterable[str] | None) -> tuple[Workload, ...]:
    """The workloads with these names, in their own order; None means all. Raises BadParameter."""
    if names is None:
        return WORKLOADS
    wanted = {name.strip().upper() for name in names}
    found = tuple(workload for workload in WORKLOADS if workload.name in wanted)
    if len(found) < len(wanted):
        raise BadParameter(f"There are no workloads {', '.join(sorted(wanted))}: choose some of W1 to W5.")
    return found


def image_file(seed: int) -> bytes:
    """The bytes of a 640×480 PNG with about the detail of a photograph; equal seeds give equal images."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(IMAGE_SIZE, Image.Resampling.BICUBIC))
    grain = rng.integers(0, 8, smooth.shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray((smooth & np.uint8(0xF8)) | grain).save(file, "PNG", compress_level=1)
    return file.getvalue()


def images_of(workload: Workload, run: int) -> list[bytes]:
    """The images of one run; no other run and no other workload has any of them."""
    first = (sum(workload.name.encode()) * 1000 + run) * 100
    return [image_file(first + i) for i in range(workload.images)]
