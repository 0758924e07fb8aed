"""Where the milliseconds of one request went."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass


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

    def as_dict(self) -> dict[str, float]:
        """Plain numbers in milliseconds, rounded to the microsecond."""
        return {name: round(value, 3) for name, value in asdict(self).items()}
