"""What the next step computes: everyone's next token, a slice of a prompt, or an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Rows

from opsin.core.backend import BackendLimits
from opsin.core.request import ImageChunk, TextChunk
from opsin.engine.plan import Encode, PrefillImage, Slice, Step, Tokens
from opsin.engine.policy import Policy
from opsin.engine.sequence import Sequence, State

_FEWEST_ROWS = 16
"""Rows of a prefill step that reads all weights once; fewer would hardly be quicker."""


class StepChooser:
    """Shares the time between streams, images and the text of prompts.

    It knows what was computed last and how long that took; cells are not its business.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._last_decode = float("-inf")
        self._step_seconds = self._row_seconds = 0.0
        self._asked: float | None = None
        self._crowd = 0
        self._text_next = True
        self._image_last = False

    def ran(self, step: Step, now: float, seconds: float, *, silent: bool) -> None:
        """A step took so long; `silent`: before it nobody's answer had begun."""
        self._asked = now if isinstance(step, Tokens) else None
        if isinstance(step, Tokens):
            if step.prefill:
                self._text_next = False
            elif step.decode:
                self._step_seconds = seconds
            self._image_last = False
            if step.prefill and not step.decode:
                self._learn(seconds, sum(len(part.tokens) for part in step.prefill))
        else:
            self._text_next = self._image_last = True
        if isinstance(step, PrefillImage):
            self._learn(seconds, step.stop - step.start)
        if silent or (isinstance(step, Tokens) and step.decode):
            self._last_decode = now  # a first token counts: its stream has not waited yet

    def _learn(self, seconds: float, rows: int) -> None:
        if rows >= _FEWEST_ROWS:  # fewer cost nearly as much as so many
            self._row_seconds = seconds / rows

    def due(self, now: float, ahead: float = 0.0) -> bool:
        """Whether streams have waited long enough for their next token while others are worked on.

        `ahead` is how long the next piece of that work takes: when most of it would come too late, it waits.
        """
        policy = self._policy
        share = min(policy.longest_wait, self._step_seconds / policy.stream_share)
        wait = max(policy.shortest_wait, self._crowded(share))
        return now + 0.75 * ahead - self._last_decode >= wait

    def due_within(self, now: float) -> bool:
        """`due`, asked again and again in an encode: the next time is as far ahead as the last one is behind."""
        since, self._asked = self._asked, now
        return self.due(now, 0.0 if since is None else now - since)

    @staticmethod
    def decoding(running: Rows[Sequence]) -> tuple[Sequence, ...]:
        """Those whose answers have begun."""
        return tuple([s for s in running if s.state is State.DECODE])

    def choose(self, running: Rows[Sequence], now: float) -> Step | None:
        """The next step; None when nobody has anything to compute."""
        decoding = self.decoding(running)
        self._crowd = len(running)
        if len(decoding) == len(running):
            return Tokens(decoding) if decoding else None
        filling = [s for s in running if s.state is State.PREFILL]
        texts = [s for s in filling if not s.at_image]
        images = [s for s in filling if s.at_image]
        if decoding and self._image_last and self.due(now):
            # Alone: a stream that waited for a slice of an image does not wait for a prompt's text, too.
            return Tokens(decoding)
        if texts and (self._text_next or not images):
            return self._tokens(decoding, texts)
        if images:
            # One image after another, not one request after another: a small one does not wait for ten images.
            return self._image(min(images, key=lambda s: s.turn), running, streaming=bool(decoding))
        return Tokens(decoding) if decoding else None

    def _image(self, sequence: Sequence, running: Rows[Sequence], *, streaming: bool) -> Step:
        chunk = sequence.chunk
        assert isinstance(chunk, ImageChunk)
        if sequence.embedding is None:
            return Encode(sequence, chunk, () if streaming else self._beside(sequence, chunk, running))
        start = sequence.chunk_offset
        stop = start + self._part(chunk.n_tokens - start, streaming=streaming) if chunk.causal else chunk.n_tokens
        last = stop == chunk.n_tokens and sequence.chunk_index == len(sequence.chunks) - 1
        return PrefillImage(sequence, chunk, start, stop, last)

    def _tokens(self, decoding: tuple[Sequence, ...], texts: list[Sequence]) -> Tokens:
        """Everyone's next token, and text of prompts as far as the slice and the ubatch go."""
        budget = min(self._limits.n_ubatch - len(decoding), self._rows(streaming=bool(decoding)))
        parts = [self._slice(s, share) for s, share in zip(texts, _shares(texts, budget), strict=True) if share]
        return Tokens(decoding, tuple(parts))

    def _beside(
        self, sequence: Sequence, chunk: ImageChunk, running: Rows[Sequence]
    ) -> tuple[tuple[Sequence, ImageChunk], ...]:
        """Chunks of equal size that are to be encoded soon; nobody may be streaming, as no turn comes in between."""
        if self._limits.encode_batch == 1:
            return ()
        others = (s for s in running if s is not sequence and s.state is State.PREFILL)
        coming = ((s, other) for s in (sequence, *others) for other in s.to_encode)
        wanted = ((s, other) for s, other in coming if other is not chunk and other.n_tokens == chunk.n_tokens)
        return tuple(itertools.islice(wanted, self._limits.encode_batch - 1))

    def _part(self, rows: int, *, streaming: bool) -> int:
        """How many of so many rows a step takes: equal parts, as the last step would cost as much as a whole one."""
        most, tile = self._rows(streaming=streaming), self._limits.tile
        parts = -(-rows // most)
        even = -(-rows // parts)
        if most >= tile:
            even = min(most // tile, -(-even // tile)) * tile
        return min(rows, even)

    def _rows(self, *, streaming: bool) -> int:
        """The most rows of a prefill step."""
        most = self._limits.n_ubatch
        if streaming:
            most = self._policy.slice
            if self._row_seconds > 0:
                most = max(min(most, _FEWEST_ROWS), int(self._crowded(self._policy.slice_seconds) / self._row_seconds))
        return max(1, min(most, self._limits.n_ubatch))

    def _crowded(self, seconds: float) -> float:
        """How long a stream may be held up, when it is `seconds` while few are served."""
        crowd = max(1.0, self._crowd / self._policy.few)
        return max(seconds, min(self._policy.crowded_wait, crowd**2 * seconds))

    @staticmethod
    def _slice(sequence: Sequence, budget: int) -> Slice:
        chunk = sequence.chunk
        assert isinstance(chunk, TextChunk)
        start = sequence.chunk_offset
        tokens = chunk.tokens[start : start + budget]
        last = start + len(tokens) == chunk.n_tokens and sequence.chunk_index == len(sequence.chunks) - 1
        return Slice(sequence, tokens, last)


def _shares(sequences: list[Sequence], budget: int) -> list[int]:
    """How many tokens each gets of a step: the first most, but half is for the others, so that none waits for it."""
    wanted = [s.chunk.n_tokens - s.chunk_offset for s in sequences if s.chunk is not None]
    if not wanted:
        return []
    least = max(1, budget // (2 * len(wanted) - 2)) if len(wanted) > 1 else 0
    shares, left = [1], budget - 1
    for want in wanted[1:]:
        shares.append(min(want, least, left))
        left -= shares[-1]
    for place, want in enumerate(wanted):
        more = min(want - shares[place], left)
        shares[place] += more
        left -= more
    return shares
