"""What a request gives back: events while it runs, the whole answer at its end, and where its time went."""

from __future__ import annotations

import enum
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from opsin.core.choice import Choice, choice_fields
from opsin.core.errors import ConstraintFailed

FinishReason = Literal["stop", "length", "cancelled"]


class Stage(enum.Enum):
    """The stages of one request; their wall intervals are disjoint and add up to the total."""

    QUEUE = "queue"
    LOAD = "load"
    FETCH = "fetch"
    IMAGE_DECODE = "image_decode"
    PREPROCESS = "preprocess"
    ENCODE = "encode"
    IMAGE_PREFILL = "image_prefill"
    TEXT_PREFILL = "text_prefill"
    SAMPLE = "sample"
    DECODE = "decode"
    DETOKENIZE = "detokenize"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Interval:
    """When one stage of a request ran: `count` times between `start` and `end`, `seconds` in all.

    Times are in seconds of the engine's clock, `time.perf_counter`. Other stages may lie in between.
    """

    stage: Stage
    start: float
    end: float
    seconds: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Stages:
    """Milliseconds by stage. `other_ms` is what no stage claimed; `total_ms` is the wall time from first to last.

    `decode_ms` includes the engine's own work between two tokens. `load_ms` is 0 where the model was loaded before.
    """

    queue_ms: float = 0.0
    load_ms: float = 0.0
    fetch_ms: float = 0.0
    image_decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    image_prefill_ms: float = 0.0
    text_prefill_ms: float = 0.0
    sample_ms: float = 0.0
    decode_ms: float = 0.0
    detokenize_ms: float = 0.0
    other_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class ReasoningStyle:
    """The tags around a family's thoughts; `dropped` are tags in its answers that no reader wants to see."""

    opening: str = "<think>"
    closing: str = "</think>"
    dropped: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags that are removed from what a reader sees."""
        return (self.opening, self.closing, *self.dropped)

    def split(self, text: str) -> tuple[str | None, str]:
        """A whole answer's thoughts (None if it has no block of them) and the rest."""
        thoughts, closing, answer = text.partition(self.closing)
        if not closing:
            return None, text
        return thoughts.lstrip().removeprefix(self.opening).strip(), answer.lstrip()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes and its natural log probability before any sampler changed the logits; `top` alternatives.

    Under a schema or grammar `permitted` is its log probability among the tokens that were permitted (None: not asked
    for), and `overruled` says that the likeliest of all was not.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    permitted: float | None = None
    overruled: bool = False


@dataclass(frozen=True, slots=True)
class Confidence:
    """Of one value: the product of its tokens' probabilities, each among the tokens that the schema permitted there.

    `changed`: at one of them the model's likeliest token was not permitted, so it would have written something else.
    """

    probability: float
    changed: bool


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image as it went in: identity, size, the size that the encoder saw, and tokens.

    `tiles` counts the pieces the preprocessing cut it into. `cached`: the encoder did not have to run. `orientation`
    is the file's EXIF value (1: upright). `notes` are sentences about what else was done to it. `source_size`,
    `region` and `page` are those of `core.request.Image`.
    """

    sha256: str
    width: int
    height: int
    resized_width: int
    resized_height: int
    tokens: int
    tiles: int = 1
    cached: bool = False
    orientation: int = 1
    notes: tuple[str, ...] = ()
    source_size: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None
    page: int | None = None

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height of the whole file, upright."""
        return self.source_size or (self.width, self.height)


@dataclass(frozen=True, slots=True)
class Box:
    """What an answer points at, in pixels of the upright file, as viewers show it: left, top, right and lower edge.

    A point has no size: its edges are equal.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float

    def stored(self, image: ImageInfo) -> Box:
        """The box in the pixels as the file stores them, before its EXIF orientation (CIPA DC-008) turns them."""
        turned, (width, height) = image.orientation, image.file_size
        xs, ys = [self.x1, self.x2], [self.y1, self.y2]
        if turned >= 5:  # rows are columns
            xs, ys, width, height = ys, xs, height, width
        xs = [width - x for x in xs] if turned in {2, 3, 7, 8} else xs
        ys = [height - y for y in ys] if turned in {3, 4, 6, 7} else ys
        return Box(self.label, min(xs), min(ys), max(xs), max(ys))


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `prompt_tokens` includes `image_tokens`; `cached_tokens` were found in the KV cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """llama-server's `timings`, with exactly its names; times in milliseconds, rates in tokens per second."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int = 0
    draft_n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class GuardVerdict:
    """Why the guard ended an answer, and after how many tokens."""

    reason: Literal["cycle", "drift", "compression"]
    at_token: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished answer.

    `limit` names what cut it when `finish_reason` is "length"; `max_tokens` was in force. `stop` is the stop string
    that ended it. `intervals` say when each stage ran; their seconds add up to `stages`. `boxes` is None where nobody
    asked for them. `choice` is there where the request had a list of labels, `confidence` in each value of JSON, by its
    JSON pointer, where it was asked for.
    """

    text: str
    reasoning: str | None
    finish_reason: FinishReason
    usage: Usage
    stages: Stages
    timings: Timings
    images: tuple[ImageInfo, ...] = ()
    guard: GuardVerdict | None = None
    limit: Literal["tokens", "seconds", "context", "guard"] | None = None
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    tokens: tuple[int, ...] = field(default=(), repr=False)
    max_tokens: int = 0
    intervals: tuple[Interval, ...] = field(default=(), repr=False)
    stop: str | None = None
    boxes: tuple[Box, ...] | None = None
    choice: Choice | None = None
    confidence: dict[str, Confidence] | None = None

    @property
    def probabilities(self) -> dict[str, float] | None:
        """How likely each label is; they add up to 1. None where the answer was free."""
        return None if self.choice is None else self.choice.probabilities

    @property
    def margin(self) -> float | None:
        """How far the likeliest label is ahead of the second, in probability."""
        return None if self.choice is None else self.choice.margin


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage began; `text` is fit for a progress line."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of the answer, or of its reasoning."""

    text: str
    reasoning: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every request that did not fail."""

    answer: Answer


Event = Progress | TextDelta | Finished


CUTS = {
    "tokens": "(cut after {0.max_tokens} tokens; --max-tokens N lifts the limit)",
    "seconds": "(cut by --max-seconds)",
    "context": "(cut because the context is full; --ctx N makes it larger)",
    "guard": "(ended by the guard: {0.guard.reason} at token {0.guard.at_token}; --no-guard lets it go on)",
}
"""What cut an answer, by its `limit`, and how to lift that."""


def parsed(answer: Answer) -> Any:
    """The value of an answer that is a choice, or JSON. Raises ConstraintFailed for one that was cut: half is none."""
    if answer.choice is not None:
        return answer.choice.value
    if answer.limit is not None:
        endless = "(it repeats itself: give the schema's texts and lists a maxLength and maxItems)"
        cut = endless if answer.limit == "guard" else CUTS[answer.limit].format(answer)
        raise ConstraintFailed(f"The answer is not whole, so it does not fit the schema {cut}.")
    return json.loads(answer.text)


def more_fields(answer: Answer) -> dict[str, Any]:
    """What rows and responses show of an answer that is more than text: its choice, the confidence in its values."""
    found: dict[str, Any] = {} if answer.boxes is None else {"boxes": [asdict(box) for box in answer.boxes]}
    if answer.confidence is not None:
        found["confidence"] = {pointer: asdict(one) for pointer, one in answer.confidence.items()}
    return choice_fields(answer.choice) | found
