"""A request on its way to the model: messages as text and images, how to answer, then tokens, then rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opsin.core.answer import ImageInfo, ReasoningStyle
from opsin.core.choice import BOOLEAN, MAX_CHOICES, MAX_LABEL_CHARS, Value, scale_labels
from opsin.core.settings import GUARD_HELP, MAX_LOGIT_BIAS, MAX_SCHEMA, MAX_SECONDS_HELP, MAX_STOP, MAX_TOKENS_HELP

if TYPE_CHECKING:  # images are decoded in processes that need no numpy
    import numpy as np
    from numpy.typing import NDArray

Embedding: TypeAlias = "NDArray[np.float32]"
_ALONE = ("json_schema", "grammar", "logprobs", "logit_bias", "thinking", "ignore_eos", "max_thinking_tokens", "boxes")


@dataclass(frozen=True, slots=True)
class Image:
    """One decoded image: upright, opaque, 8 bit sRGB.

    `rgb` holds `height * width * 3` bytes, row by row, maybe in memory that other processes map. `sha256` (hex) covers
    width, height and pixels, not the file. `orientation` is the file's EXIF value (1 to 8), which was applied. `notes`
    are sentences for the user about what was done to it. `fetch_ms` and `decode_ms` are wall times in milliseconds.
    `source_size` is the whole upright file's width and height, if they differ from these; `region` is the part of it
    that was cut out: left, top, width and height in its pixels. `frame` is its number in a video: where it follows the
    number of the image before, both are of one video (None: a still image). `page` is its number in a document, from 1.
    """

    rgb: bytes | mmap = field(repr=False)
    width: int
    height: int
    sha256: str
    format: str
    orientation: int = 1
    notes: tuple[str, ...] = ()
    fetch_ms: float = 0.0
    decode_ms: float = 0.0
    source_size: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None
    frame: int | None = None
    page: int | None = None


@dataclass(frozen=True, slots=True)
class TextPart:
    """A span of text. With `special` the names of control tokens in it become those tokens, else they stay text."""

    text: str
    special: bool = True


@dataclass(frozen=True, slots=True)
class ImagePart:
    """One image."""

    image: Image


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the template made of the messages.

    `add_bos`: the tokenizer adds its begin token, which the template did not write. `thinking`: the prompt ends inside
    an open reasoning block, which `reasoning` marks (None: the model does not think). `stop` strings end the answer.
    `continues`: the answer goes on in the middle of a text, so white space at its start counts. `folded`: the template
    does not take these messages as they are, so system messages were joined, or tool calls became text.
    """

    parts: tuple[Part, ...]
    add_bos: bool = True
    thinking: bool = False
    reasoning: ReasoningStyle | None = None
    stop: tuple[str, ...] = ()
    continues: bool = False
    folded: bool = False

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in order."""
        return tuple(part.image for part in self.parts if isinstance(part, ImagePart))


class SamplingParams(BaseModel):
    """Settings of one answer; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.2, ge=0.0, le=10.0, description="randomness; 0 always takes the most likely token")
    top_k: int = Field(40, ge=0, description="0 switches it off")
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_p: float = Field(0.05, ge=0.0, le=1.0)
    repeat_penalty: float = Field(1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    penalty_last_n: int = Field(64, ge=-1, le=65536, description="tokens looked back at; -1 is the context")
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    seed: int | None = Field(None, ge=0, le=2**32 - 2, description="number that makes a random answer repeatable")
    max_tokens: int | None = Field(None, ge=1, description=MAX_TOKENS_HELP)
    min_tokens: int = Field(0, ge=0, description="tokens before the answer may end, unless a schema ends it")
    max_seconds: float | None = Field(None, gt=0.0, description=MAX_SECONDS_HELP)
    thinking: bool | None = Field(None, description="reasoning before the answer, for models that can")
    max_thinking_tokens: int | None = Field(None, ge=0, description="longest reasoning in tokens; 0: none at all")
    stop: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=MAX_STOP)
    ignore_eos: bool = False
    guard: bool = Field(True, description=GUARD_HELP)
    boxes: bool = Field(False, description="boxes of the answer in pixels of the file, for models that can point")
    json_schema: str | None = Field(None, max_length=MAX_SCHEMA, description="a JSON schema as text")
    grammar: str | None = Field(None, max_length=MAX_SCHEMA, description="a GBNF grammar as text")
    logprobs: int | None = Field(None, ge=0, le=20, description="most likely tokens to report; 0: the chosen alone")
    choices: tuple[Annotated[str, Field(max_length=MAX_LABEL_CHARS)], ...] = Field(
        (), max_length=MAX_CHOICES, description="labels that the answer is one of"
    )
    scale: str | None = Field(None, description="whole numbers to rate with: 1-5")
    boolean: bool = Field(False, description="the answer is yes or no")
    reasons: bool | None = Field(None, description="own words before the label; unset: where it hardly begins with one")
    confidence: bool = Field(False, description="how sure the model is of each value of a JSON schema's answer")

    @property
    def labels(self) -> dict[str, Value]:
        """What the answer may be, and what each label stands for; empty where it is free."""
        if self.scale is not None:
            return scale_labels(self.scale)
        return dict(BOOLEAN) if self.boolean else {label: label for label in self.choices}

    @property
    def has_value(self) -> bool:
        """Whether a whole answer is a value: JSON that fits a schema, or a label."""
        return self.json_schema is not None or bool(self.labels)

    @model_validator(mode="after")
    def _a_list(self) -> SamplingParams:
        """Labels that can be told apart, and nothing beside them that could not be honoured."""
        kinds = [name for name in ("choices", "scale", "boolean") if getattr(self, name)]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} cannot be used together: give one of them")
        if self.reasons is not None and not kinds:
            raise ValueError("reasons come before a label: give choices, scale or boolean, too")
        for name in _ALONE if kinds else ():
            value = getattr(self, name)
            if not (value is None or value is False or value == {}):
                raise ValueError(f"{name} cannot be used with {kinds[0]}: leave one of them out")
        labels = [label.strip() for label in self.labels]
        if self.choices and (len(labels) < 2 or "" in labels or len(labels) < len(self.choices)):
            raise ValueError("choices must be two or more labels, none of them empty or twice the same")
        if labels != list(self.labels):
            raise ValueError("choices must not begin or end with white space: leave it out")
        return self

    @model_validator(mode="after")
    def _one_shape(self) -> SamplingParams:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar cannot be used together: give one of them")
        if self.confidence and self.json_schema is None:
            raise ValueError("confidence is that of a JSON schema's values: give a schema, too")
        if "" in self.stop:
            raise ValueError("a stop string is empty: leave it out")
        return self


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Tokens that are decoded as tokens. Each takes one position and one cell of the KV cache."""

    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache."""
        return len(self.tokens)

    n_pos = n_tokens


@dataclass(frozen=True, slots=True)
class ImageChunk:
    """One chunk of one image: `n_tokens` embeddings; equal `identity` (by content) means equal embeddings.

    Some models merge `frames` of a video into one chunk: that image, and those that follow it.

    Under M-RoPE `n_pos` is less than `n_tokens`, `positions` is int32 [n_tokens, 4] (time, height, width, one more) for
    a chunk that starts at 0, and `moves` of the same shape is 1 where a position counts from the chunk's first (None:
    everywhere); else both are None. `causal=False`: the chunk attends in both directions and must go in one ubatch.
    `handle` belongs to the backend and lives until its TokenizedPrompt is closed. A `placeholder` has no pixels,
    because its embedding was known already, and cannot be encoded.
    """

    identity: str
    image: int
    n_tokens: int
    n_pos: int
    causal: bool = True
    placeholder: bool = False
    frames: int = 1
    positions: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    moves: NDArray[np.int32] | None = field(default=None, repr=False, compare=False)
    handle: Any = field(default=None, repr=False, compare=False)

    @property
    def last_pos(self) -> int:
        """The largest position in time of a row, from the chunk's first: what the KV cache knows of the chunk."""
        return self.n_tokens - 1 if self.positions is None else int(self.positions[:, 0].max())

    def positions_at(self, first: int, start: int, stop: int) -> NDArray[np.int32]:
        """Positions of rows [start, stop) of a chunk whose first position is `first`: int32 [1, n], or [4, n]."""
        import numpy as np

        if self.positions is None:
            return np.arange(first + start, first + stop, dtype=np.int32)[np.newaxis, :]
        moved = np.int32(first) if self.moves is None else self.moves[start:stop] * np.int32(first)
        return np.ascontiguousarray((self.positions[start:stop] + moved).T)


Chunk = TextChunk | ImageChunk


@dataclass(slots=True)
class TokenizedPrompt:
    """All chunks of a prompt. The owner closes it when the last image is encoded, or the request has ended.

    `owned`, which has a `close()`, must stay alive while an `ImageChunk.handle` is used.
    """

    chunks: tuple[Chunk, ...]
    images: tuple[ImageInfo, ...]
    owned: Any = field(default=None, repr=False)

    @property
    def n_tokens(self) -> int:
        """Cells of the KV cache that the prompt takes."""
        return sum(chunk.n_tokens for chunk in self.chunks)

    @property
    def n_image_tokens(self) -> int:
        """Cells that image embeddings take."""
        return sum(chunk.n_tokens for chunk in self.chunks if isinstance(chunk, ImageChunk))

    def close(self) -> None:
        """Give the backend's handles back; twice does no harm."""
        owned, self.owned = self.owned, None
        if owned is not None:
            owned.close()


@dataclass(slots=True)
class TokenBatch:
    """Tokens of one ubatch, row by row: the token, its position, its sequence; `outputs` are rows that want logits.

    `shared` are further sequences, which hold the same cells before it, that a row belongs to.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    shared: dict[int, list[int]] = field(default_factory=dict)

    def append(self, tokens: Sequence[int], start: int, seq_id: int, *, logits: bool) -> None:
        """Tokens of one sequence from position `start` on; with `logits` the last one's are wanted."""
        self.tokens.extend(tokens)
        self.positions.extend(range(start, start + len(tokens)))
        self.seq_ids.extend([seq_id] * len(tokens))
        if logits:
            self.outputs.append(len(self.tokens) - 1)


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """A slice of an image's embedding for one sequence: `rows` is float32 [n, n_embd], contiguous.

    `positions` is absolute, int32 [4, n] (section-major) under M-RoPE, else [1, n]. With `logits` the last row's are
    kept. `causal=False` asks for attention in both directions. The rows of `beside`, tokens of other sequences, come
    first in the batch, as far as `BackendLimits.mixed_rows` goes. Last come those of `behind`, tokens that follow the
    image, from position `behind_at` on; where `mixed_rows` is not 0.
    """

    rows: Embedding
    positions: NDArray[np.int32]
    seq_id: int
    logits: bool = False
    causal: bool = True
    beside: TokenBatch = field(default_factory=TokenBatch)
    behind: tuple[int, ...] = ()
    behind_at: int = 0
