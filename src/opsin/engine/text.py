"""From tokens to the text a caller sees: whole characters, reasoning apart, and no stop strings.

The readers are incremental, and all promise the same: however the input is cut, the pieces they give back join to what
reading it whole would give.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence

from opsin.core.answer import GuardVerdict, TextDelta, TokenLogprob
from opsin.core.errors import BadParameter
from opsin.core.reasoning import ReasoningSplitter
from opsin.engine.guard import Guard


class Utf8Stream:
    """Decodes UTF-8 that arrives in pieces, such as the bytes of tokens.

    A character cut by the end of a piece waits for its other bytes. Bytes that can no longer become a character turn
    into U+FFFD, exactly as `bytes.decode("utf-8", "replace")` does it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = False

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes, possibly none."""
        if not self._waiting and data.isascii():
            return data.decode("ascii")
        text = self._decoder.decode(data)
        self._waiting = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._waiting = False
        return rest


class StopStrings:
    """Cuts streamed text before the first stop string.

    First is the one that is complete first; when two end at the same character, the longer one. So an answer ends at
    the earliest moment at which its text contains a stop string, whatever the borders of its tokens.

    Raises BadParameter for an empty stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        if "" in self._stops:
            raise BadParameter("A stop string is empty: leave it out.")
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was met.

        The longest end of the text that may still become a stop string is held back, no more. After a hit nothing
        comes any more.
        """
        if self.found is not None:
            return "", True
        if not self._stops:
            return text, False
        # What is held back is shorter than any stop string that it begins, so every hit ends in the new text.
        whole, self._held = self._held + text, ""
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            return whole[:start], True
        keep = max(_overlap(whole, stop) for stop in self._stops)
        shown = len(whole) - keep
        self._held = whole[shown:]
        return whole[:shown], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0


class AnswerText:
    """The growing answer of one request; knows no backend and no clock.

    `stopped` turns True at a stop string, `verdict` is set when the guard speaks. Stop strings are looked for in the
    answer only, never in the reasoning; white space at the answer's start is the template's, and left out. `tags` gives
    bytes to control tokens that mark reasoning: as tokens they have no text, and the splitter would not see them.
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        splitter: ReasoningSplitter | None = None,
        guard: Guard | None = None,
        tags: Mapping[int, bytes] | None = None,
    ) -> None:
        self.stopped = False
        self.verdict: GuardVerdict | None = None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0
        self._splitter = splitter
        self._guard = guard
        self._tags = tags or {}
        self._utf8 = Utf8Stream()
        self._stops = StopStrings(stop)
        self._plain = splitter is None and not stop
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._pending: list[TokenLogprob] = []

    @property
    def thinking(self) -> bool:
        """Whether the answer is inside a reasoning block now."""
        return self._splitter is not None and self._splitter.inside

    @property
    def text(self) -> str:
        """The answer so far, without reasoning."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far; None when the model did none."""
        return "".join(self._reasoning) or None

    def feed(self, token: int, piece: bytes, logprob: TokenLogprob | None = None) -> list[TextDelta]:
        """Take one token in; give what may be shown now."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self._pending.append(logprob)
        text = self._utf8.feed(piece or self._tags.get(token, b""))
        if self._guard is not None and self.verdict is None:
            self.verdict = self._guard.feed(token, text)
        if self._plain:
            return self._show(text) if text else []
        if self.thinking:
            self.reasoning_tokens += 1
        return self._split(text)

    def finish(self) -> list[TextDelta]:
        """Give what was held back; called once, at the end."""
        deltas = self._split(self._utf8.finish())
        if self._splitter is not None:
            deltas += self._deltas(*self._splitter.finish())
        if not self.stopped:
            deltas += self._show(self._stops.flush())
        return deltas

    def _split(self, text: str) -> list[TextDelta]:
        return self._deltas("", text) if self._splitter is None else self._deltas(*self._splitter.feed(text))

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
        return [TextDelta(text, logprobs=self._taken() if self._pending else ())]

    def _taken(self) -> tuple[TokenLogprob, ...]:
        pending, self._pending = tuple(self._pending), []
        return pending
