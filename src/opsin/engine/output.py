"""From tokens to the text a caller sees: UTF-8, reasoning apart, stop strings, guard, log probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opsin.core.answer import GuardVerdict, TextDelta, TokenLogprob
from opsin.core.reasoning import ReasoningSplitter
from opsin.engine.guard import Guard
from opsin.engine.text import StopStrings, Utf8Stream


@dataclass(slots=True)
class Output:
    """The growing answer of one request; knows no backend and no clock.

    `stopped` turns True at a stop string, `verdict` is set when the guard speaks. Stop strings are looked for in the
    answer only, never in the reasoning; the answer's leading white space is the template's, and left out. `tags` gives
    bytes to control tokens that mark reasoning: as tokens they have no text, and the splitter would not see them.
    """

    stop: tuple[str, ...]
    splitter: ReasoningSplitter | None
    guard: Guard | None
    tags: Mapping[int, bytes] = field(default_factory=dict)
    stopped: bool = False
    verdict: GuardVerdict | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_tokens: int = 0
    _utf8: Utf8Stream = field(default_factory=Utf8Stream)
    _stops: StopStrings = field(init=False)
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _pending: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.stop)

    @property
    def thinking(self) -> bool:
        """Whether the answer is inside a reasoning block now."""
        return self.splitter is not None and self.splitter.inside

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far; None when the model did none."""
        return "".join(self._reasoning) or None

    def feed(self, token: int, piece: bytes, logprob: TokenLogprob | None) -> list[TextDelta]:
        """Take one token in; give what may be shown now."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self._pending.append(logprob)
        text = self._utf8.feed(piece or self.tags.get(token, b""))
        if self.guard is not None and self.verdict is None:
            self.verdict = self.guard.feed(token, text)
        if self.thinking:
            self.reasoning_tokens += 1
        return self._split(text)

    def finish(self) -> list[TextDelta]:
        """Give what was held back; called once, at the end."""
        deltas = self._split(self._utf8.finish())
        if self.splitter is not None:
            reasoning, text = self.splitter.finish()
            deltas += self._deltas(reasoning, text)
        if not self.stopped:
            deltas += self._show(self._stops.flush())
        return deltas

    def _split(self, text: str) -> list[TextDelta]:
        if self.splitter is None:
            return self._deltas("", text)
        return self._deltas(*self.splitter.feed(text))

    def _deltas(self, reasoning: str, text: str) -> list[TextDelta]:
        deltas: list[TextDelta] = []
        if reasoning:
            self._reasoning.append(reasoning)
            deltas.append(TextDelta(reasoning, reasoning=True, logprobs=self._taken()))
        if text and not self.stopped:
            safe, self.stopped = self._stops.feed(text)
            deltas += self._show(safe)
        return deltas

    def _show(self, text: str) -> list[TextDelta]:
        if not self._text:
            text = text.lstrip()
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text, logprobs=self._taken())]

    def _taken(self) -> tuple[TokenLogprob, ...]:
        pending, self._pending = tuple(self._pending), []
        return pending
