"""What the next step computes: everyone's next token, a slice of a prompt, or a picture."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable

from opsin.core.backend import BackendLimits
from opsin.core.layout import ImageRun, TextRun
from opsin.engine.plan import Encode, PrefillImage, Slice, Step, Tokens
from opsin.engine.policy import Policy
from opsin.engine.sequence import Sequence, State

_FEWEST_ROWS = 16
"""Rows of a prefill step that reads all weights once; fewer would hardly be quicker."""


class StepChooser:
    """Shares the time between streams, pictures and prompts' texts.

    It knows what was computed last and how long that took; cells are not its business.
    """

    def __init__(self, limits: BackendLimits, policy: Policy, common: Container[int] = ()) -> None:
        """`common` are the ids in the common memory, now and later."""
        self._limits = limits
        self._common = common
        self._policy = policy
        self._last_decode = float("-inf")
        self._step_seconds = self._slice_seconds = self._row_seconds = 0.0
        self._asked: float | None = None
        self._crowd = 0
        self._only_prompts = False
        self._text_next = True

    def ran(self, step: Step, now: float, seconds: float, *, silent: bool) -> None:
        """A step took so long; `silent`: before it nobody's answer had begun."""
        self._asked = now if isinstance(step, Tokens) else None
        if isinstance(step, Tokens):
            if step.decode and not step.prefill:
                self._step_seconds = seconds
            if step.prefill:
                self._text_next = False
            self._only_prompts = not (step.decode or self._limits.shared)
        else:
            self._text_next = self._only_prompts = True
        if self._only_prompts and not isinstance(step, Encode):
            self._slice_seconds = seconds
        if isinstance(step, PrefillImage) and step.run.causal:
            self._row_seconds = seconds / (step.stop - step.start)
        if silent or (isinstance(step, Tokens) and step.decode):
            self._last_decode = now  # a first token counts: its stream has not waited yet

    def due(self, now: float, ahead: float = 0.0) -> bool:
        """Whether streams have waited long enough for their next token while others are worked on.

        `ahead` is how long the next piece of that work takes: when most of it would come too late, it waits.
        """
        policy = self._policy
        wait = max(policy.turn, self._crowded(min(policy.longest_turn, self._step_seconds / policy.turn_share)))
        return now + 0.75 * ahead - self._last_decode >= wait

    def due_within(self, now: float) -> bool:
        """`due`, asked again and again in an encode: the next time is as far ahead as the last one is behind."""
        since, self._asked = self._asked, now
        return self.due(now, 0.0 if since is None else now - since)

    def decoding(self, running: Iterable[Sequence]) -> tuple[Sequence, ...]:
        """Those whose answers have begun, in the order of a batch's rows."""
        decoding = (s for s in running if s.state is State.DECODE)
        return tuple(decoding if self._limits.shared else sorted(decoding, key=lambda s: s.seq_id))

    def choose(self, running: Iterable[Sequence], now: float) -> Step | None:
        """The next step; None when nobody has anything to compute."""
        running = tuple(running)
        filling = [s for s in running if s.state is State.PREFILL]
        self._crowd = len(running)
        texts = [s for s in filling if not s.at_image]
        images = [s for s in filling if s.at_image]
        decoding = self.decoding(running)
        if decoding and self._only_prompts and self.due(now, self._slice_seconds):
            # Alone: a stream that waited for a slice of a picture does not wait for a prompt's text, too.
            return Tokens(decoding)
        if texts and (self._text_next or not images):
            return self._tokens(decoding, texts)
        if images:
            # One picture after another, not one request after another: a small one does not wait for ten pictures.
            return self._image(min(images, key=lambda s: s.turn), running, streaming=bool(decoding))
        return Tokens(decoding) if decoding else None

    def _image(self, sequence: Sequence, running: tuple[Sequence, ...], *, streaming: bool) -> Step:
        run = sequence.run
        assert isinstance(run, ImageRun)
        if sequence.embedding is None:
            return Encode(sequence, run, () if streaming else self._beside(sequence, run, running))
        start = sequence.run_offset
        stop = start + self._part(run.n_tokens - start, streaming=streaming) if run.causal else run.n_tokens
        last = stop == run.n_tokens and sequence.run_index == len(sequence.runs) - 1
        return PrefillImage(sequence, run, start, stop, last)

    def _tokens(self, decoding: tuple[Sequence, ...], texts: list[Sequence]) -> Tokens:
        """Everyone's next token, and text of prompts as far as the slice and the micro-batch go."""
        budget = min(self._limits.n_ubatch - len(decoding), self._rows(streaming=bool(decoding)))
        if not self._limits.shared:
            decoding = ()
            texts = sorted(texts, key=lambda s: s.turn)
            # Prompts of unequal lengths would be cut into as many micro-batches, but for those in the common memory.
            together = texts[0].seq_id in self._common
            texts = [s for s in texts if s.seq_id in self._common] if together else texts[:1]
        parts = [self._slice(s, share) for s, share in zip(texts, _shares(texts, budget), strict=True) if share]
        if not self._limits.shared:
            # Who has to leave the common memory before the step is computed is one of many at places of their own.
            parts.sort(key=lambda part: part.sequence.seq_id)
        return Tokens(decoding, tuple(parts))

    def _beside(
        self, sequence: Sequence, run: ImageRun, running: tuple[Sequence, ...]
    ) -> tuple[tuple[Sequence, ImageRun], ...]:
        """Chunks of equal size that are to be encoded soon; nobody may be streaming, as no turn comes in between."""
        others = (s for s in running if s is not sequence and s.embedding is None)
        coming = ((s, other) for s in (sequence, *others) for other in s.runs[s.run_index :])
        wanted = (
            (s, other)
            for s, other in coming
            if isinstance(other, ImageRun) and other is not run and other.n_tokens == run.n_tokens
        )
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
        most = self._limits.best_rows or self._limits.n_ubatch
        if streaming:
            most = self._policy.slice
            if self._row_seconds > 0:
                most = max(min(most, _FEWEST_ROWS), int(self._crowded(self._policy.slice_seconds) / self._row_seconds))
        return max(1, min(most, self._limits.n_ubatch))

    def _crowded(self, seconds: float) -> float:
        """How long a stream may be held up, when it is `seconds` while few are served."""
        crowd = max(1.0, self._crowd / self._policy.few)
        return max(seconds, min(self._policy.crowded_turn, crowd**2 * seconds))

    @staticmethod
    def _slice(sequence: Sequence, budget: int) -> Slice:
        run = sequence.run
        assert isinstance(run, TextRun)
        start = sequence.run_offset
        tokens = run.tokens[start : start + budget]
        last = start + len(tokens) == run.n_tokens and sequence.run_index == len(sequence.runs) - 1
        return Slice(sequence, tokens, last)


def _shares(sequences: list[Sequence], budget: int) -> list[int]:
    """How many tokens each gets of a step: the first most, but half is for the others, so that none waits for it."""
    wanted = [s.run.n_tokens - s.run_offset for s in sequences if s.run is not None]
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
