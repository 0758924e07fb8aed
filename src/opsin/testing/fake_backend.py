"""A backend without a model: every token is one byte, and the answer is what a plain function makes of the prompt.

It keeps the contract of core.backend and checks its caller: positions must follow each other, sequences must be
known, batches must fit, everything must be closed in order.
"""

# ruff: noqa: D102 - as in `core.backend.Backend`, where nothing else is said
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from opsin.core.answer import ImageInfo, TokenLogprob
from opsin.core.backend import BackendLimits, Sample, Sampler, Stopped
from opsin.core.errors import BadGrammar, DecodeFailed, EncodeFailed, OpsinError
from opsin.core.model_info import BackendShare, ModelInfo, Placement
from opsin.core.request import (
    Chunk,
    Embedding,
    EmbeddingRows,
    Image,
    ImageChunk,
    ImagePart,
    Part,
    SamplingParams,
    TextChunk,
    TokenBatch,
    TokenizedPrompt,
)

BOS, EOS, TURN = 256, 257, 258
"""Tokens behind the 256 bytes: begin, end, and the mark (written as the character U+001E) where an answer starts."""
TURN_TEXT, N_VOCAB = "\x1e", 259


def image(seed: int = 0, width: int = 8, height: int = 6) -> Image:
    """An image of one colour, chosen by `seed`; equal arguments give equal images."""
    rgb = hashlib.sha256(str(seed).encode()).digest()[:3] * (width * height)
    digest = hashlib.sha256(width.to_bytes(4, "little") + height.to_bytes(4, "little") + rgb).hexdigest()
    return Image(rgb, width, height, digest, "PNG")


class FakeClock:
    """Seconds that pass only when somebody spends them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """The time now."""
        return self.seconds

    def spend(self, ms: float) -> None:
        """Let `ms` milliseconds pass."""
        self.seconds += ms / 1e3


@dataclass(slots=True)
class _Handle:
    """A sampler, or what a tokenized prompt keeps: the backend counts those that are open."""

    backend: "FakeBackend"
    ignore_eos: bool = False
    before_end: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self.backend.open_handles += 1

    def sample(self, row: int) -> int:
        token = self.backend.next_token(row)
        self.before_end -= 1
        return ord(".") if token == EOS and (self.ignore_eos or self.before_end >= 0) else token

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.backend.open_handles -= 1


class FakeBackend:
    """See the module. `reply` gets the prompt as text, with `<identity>` for each image row, and gives the answer.

    `clock` passes by what each piece of work takes, in milliseconds: `preprocess_ms` and its like.
    """

    preprocess_ms, encode_ms, image_token_ms, text_token_ms, decode_ms = 3.0, 40.0, 0.5, 0.25, 8.0
    info = ModelInfo("fake", "fake", "fake", "fake.gguf", "mmproj-fake.gguf", "f16")
    eog_tokens = frozenset({EOS})

    def __init__(
        self,
        reply: Callable[[str], str] = lambda _: "an image.",
        *,
        limits: BackendLimits | None = None,
        clock: FakeClock | None = None,
        image_tokens: int = 4,
    ) -> None:
        self.reply = reply
        self.limits = limits or BackendLimits(512, 64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=512)
        self.clock = clock or FakeClock()
        self.image_tokens = image_tokens
        self.encoded: list[str] = []
        self.fail_encode: Exception | None = None
        self.fail_decode: Exception | None = None
        self.on_decode: Callable[[], None] = lambda: None
        self.stopped = False
        self.open_handles = 0
        self.closed = False
        # A KV cell is a list with a token, or an image row's identity. Forks share cells.
        self._sequences: defaultdict[int, list[list[int | str]]] = defaultdict(list)
        self._rows: list[tuple[int, int]] = []  # sequence and length of each

    def tokenize(
        self, parts: Sequence[Part], *, add_bos: bool, known: Callable[[str], bool] | None = None
    ) -> TokenizedPrompt:
        """One token a byte, `image_tokens` rows an image."""
        chunks: list[Chunk] = []
        images: list[ImageInfo] = []
        tokens: list[int] = [BOS] if add_bos else []
        for part in parts:
            if not isinstance(part, ImagePart):
                tokens += (TURN if part.special and byte == ord(TURN_TEXT) else byte for byte in part.text.encode())
                continue
            if tokens:
                chunks.append(TextChunk(tuple(tokens)))
                tokens = []
            image, size = part.image, self.image_tokens
            identity = f"{image.sha256}:0"
            placeholder = known is not None and known(identity)
            chunks.append(ImageChunk(identity, len(images), size, size, placeholder=placeholder))
            about = ImageInfo(image.sha256, image.width, image.height, 8, 8, size, notes=image.notes, page=image.page)
            images.append(about)
            if not placeholder:
                self.clock.spend(self.preprocess_ms)
        if tokens:
            chunks.append(TextChunk(tuple(tokens)))
        return TokenizedPrompt(tuple(chunks), tuple(images), _Handle(self))

    def encode(self, chunk: ImageChunk, between: Callable[[], None] | None = None) -> Embedding:
        """Rows that say which image and which row they are."""
        assert not chunk.placeholder, "a placeholder has nothing to encode"
        error, self.fail_encode = self.fail_encode, None
        if error is not None:
            raise EncodeFailed(str(error)) from error
        if between is not None:
            between()
        self.clock.spend(self.encode_ms)
        self.encoded.append(chunk.identity)
        first = int.from_bytes(hashlib.sha256(chunk.identity.encode()).digest()[:2], "little")
        rows = np.arange(chunk.n_tokens, dtype=np.float32)
        return np.stack([np.full_like(rows, first), rows, rows, rows], axis=1)

    def encode_many(self, chunks: Sequence[ImageChunk]) -> list[Embedding]:
        """All in the time of one."""
        embeddings = [self.encode(chunk) for chunk in chunks]
        self.clock.spend(-self.encode_ms * (len(chunks) - 1))
        return embeddings

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        """Append to the sequences' cells, checking what llama.cpp would abort on."""
        error, self.fail_decode = self.fail_decode, None
        if error is not None:
            raise DecodeFailed(str(error)) from error
        batch = rows.beside if isinstance(rows, EmbeddingRows) else rows
        entries: list[int | str] = [*batch.tokens]
        positions, seq_ids = list(batch.positions), list(batch.seq_ids)
        ms = self.decode_ms if len(batch.outputs) == len(entries) > 0 else self.text_token_ms * len(entries)
        if isinstance(rows, EmbeddingRows):
            assert rows.causal or not entries, "tokens never go beside rows that attend in both directions"
            entries += [f"<{int(row[0])}.{int(row[1])}>" for row in rows.rows]
            positions += [int(time) for time in rows.positions[0]]
            entries += rows.behind
            positions += range(rows.behind_at, rows.behind_at + len(rows.behind))
            seq_ids += [rows.seq_id] * (len(rows.rows) + len(rows.behind))
            ms = self.image_token_ms * len(entries)
        self.on_decode()
        if may_stop and self.stopped:
            raise Stopped
        count = len(entries)
        assert 0 < count <= self.limits.n_ubatch, "a ubatch holds 1 to n_ubatch rows"
        if self.cells_used + count > self.limits.n_ctx:
            return False
        self._rows = []
        for row, (entry, pos, seq_id) in enumerate(zip(entries, positions, seq_ids, strict=True)):
            self._append(seq_id, pos, entry)
            for other in batch.shared.get(row, ()):
                assert self._sequences[other] == self._sequences[seq_id][:-1], "they hold the same before"
                self._sequences[other].append(self._sequences[seq_id][-1])
            self._rows.append((seq_id, len(self._sequences[seq_id])))
        self.clock.spend(ms)
        return True

    def stop(self, on: bool) -> None:
        """Let decodes that may stop end."""
        self.stopped = on

    def synchronize(self) -> None:
        """All is done when `decode` returns."""

    def check(self, params: SamplingParams) -> object:
        """A grammar that is the word "bad" is refused."""
        if params.grammar == "bad":
            raise BadGrammar("The grammar cannot be read: fix its first rule.")
        return params.json_schema or params.grammar

    def sampler(self, params: SamplingParams, seed: int, compiled: object = None) -> Sampler:  # noqa: ARG002 - draws nothing
        return _Handle(self, params.ignore_eos, params.min_tokens)

    def sample(self, samples: Sequence[Sample]) -> list[tuple[int, TokenLogprob | None] | OpsinError]:
        results: list[tuple[int, TokenLogprob | None] | OpsinError] = []
        for sampler, row, top in samples:
            try:
                token = cast(_Handle, sampler).sample(row)
                results.append((token, None if top is None else self.logprobs(row, token, top)))
            except OpsinError as error:
                results.append(error)
        return results

    def logprobs(self, row: int, token: int, top: int) -> TokenLogprob:
        """The drawn token is certain."""
        best = self.next_token(row)
        alternatives = ((best, self.piece(best), 0.0),)[:top]
        return TokenLogprob(token, self.piece(token), 0.0 if token == best else -10.0, alternatives)

    def score(self, row: int, tokens: Sequence[int]) -> list[float]:
        """As `logprobs`: the next byte of the reply is certain, all others are as unlikely as each other."""
        return [self.logprobs(row, token, 0).logprob for token in tokens]

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def kv_remove(self, seq_id: int, start: int, end: int) -> bool:
        cells = self._sequences[seq_id]
        del cells[start : len(cells) if end < 0 else end]
        if not cells:
            del self._sequences[seq_id]
        return True

    def kv_copy(self, source: int, target: int, start: int, end: int) -> None:
        cells, held = self._sequences[source], self._sequences[target]
        assert len(held) == start, "a copy continues where the target ends"
        held.extend(cells[start : len(cells) if end < 0 else end])

    def kv_save(self, seq_id: int) -> list[int | str]:
        return [entry for [entry] in self._sequences[seq_id]]

    def kv_load(self, seq_id: int, saved: list[int | str]) -> None:
        assert self.kv_last(seq_id) < 0, "only an empty sequence can be loaded"
        for pos, entry in enumerate(saved):
            self._append(seq_id, pos, entry)

    def kv_last(self, seq_id: int) -> int:
        return len(self._sequences.get(seq_id, ())) - 1

    def placement(self) -> Placement:
        """All on one made-up device."""
        share = {"FAKE0": BackendShare(nodes=2, share_of_ops=1.0, share_of_time=1.0, ops={"MUL_MAT": 2})}
        return Placement(encoder=share, language_model=share, layers_offloaded=1, layers=1)

    def pause_threads(self) -> None:
        """Nothing to let go."""

    def close(self) -> None:
        """Everything else must be closed by now."""
        if not self.closed:
            self.closed = True
            assert self.open_handles == 0, f"{self.open_handles} samplers or tokenized prompts outlive their backend"

    @property
    def cells_used(self) -> int:
        """Cells that some sequence holds; shared ones count once."""
        return len({id(cell) for cells in self._sequences.values() for cell in cells})

    def next_token(self, row: int) -> int:
        """The reply's next byte for the sequence of a batch row; EOS behind its end."""
        seq_id, length = self._rows[row]
        entries = [entry for [entry] in self._sequences[seq_id][:length]]
        turn = max((i for i, entry in enumerate(entries) if entry == TURN), default=-1)
        prompt = "".join(_text(entry) for entry in entries[: turn + 1])
        answer = self.reply(prompt).encode()
        said = len(entries) - turn - 1
        return answer[said] if turn >= 0 and said < len(answer) else EOS

    def _append(self, seq_id: int, pos: int, entry: int | str) -> None:
        assert 0 <= seq_id < self.limits.n_seq_max, "a sequence id is below n_seq_max"
        cells = self._sequences[seq_id]
        assert pos == len(cells), f"position {pos} follows {len(cells) - 1}"
        cells.append([entry])


def _text(entry: int | str) -> str:
    if isinstance(entry, str):
        return entry
    return TURN_TEXT if entry == TURN else chr(entry) if entry < 256 else ""
