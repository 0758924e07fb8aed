"""From tokens to the text a caller sees: whole characters, reasoning apart, no stop strings.

The readers are incremental: however the input is cut, the pieces they give join to what reading it whole would give.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

from opsin.core.answer import GuardVerdict, ReasoningStyle, TextDelta, TokenLogprob
from opsin.engine.guard import Guard


class StopStrings:
    """Cuts streamed text before the first stop string.

    First is the one that is complete first; when two end at the same character, the longer one. So an answer ends at
    the earliest moment at which its text contains a stop string, whatever the borders of its tokens. `met` is the one
    that ended it.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        """Text that can be shown now; nothing any more once a stop string was `met`.

        The longest end of the text that may still become a stop string is held back, no more.
        """
        if self.met is not None or not self._stops:
            return text if self.met is None else ""
        # What is held back is shorter than any stop string that it begins, so every hit ends in the new text.
        whole, self._held = self._held + text, ""
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if hits:
            _, at, self.met = min(hits)
            return whole[:at]
        shown = len(whole) - max(_overlap(whole, stop) for stop in self._stops)
        self._held = whole[shown:]
        return whole[:shown]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    start = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while start >= 0:
        if mark.startswith(text[start:]):
            return len(text) - start
        start = text.find(mark[0], start + 1)
    return 0


class ReasoningSplitter:
    """Takes an answer piece by piece and returns each piece as thoughts or as text; a tag may come in pieces.

    Only a block at the start of the answer counts: later tags are text. Space around the tags is dropped. What might
    be the beginning of a tag, and space before the end of the thoughts, is held back until the next piece.
    `starts_inside`: the prompt opened the block. `inside`: what comes next is thoughts, as far as is known.
    """

    def __init__(self, style: ReasoningStyle, *, starts_inside: bool) -> None:
        self.inside = starts_inside
        self._style = style
        self._dropped = re.compile("|".join(map(re.escape, style.dropped)) or "(?!)")  # the last fits nowhere
        self._may_open = True
        self._bare = starts_inside  # only space was seen since the last tag: it is dropped
        self._held = ""

    def feed(self, delta: str) -> tuple[str, str]:
        """The new thoughts and the new text that are certain so far; either may be empty."""
        self._held += delta
        if self._may_open and not self._open():
            return "", ""
        thoughts = self._think() if self.inside else ""
        text = "" if self.inside else self._answer()
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        """What was held back, when the answer is over."""
        held, self._held = self._shown(self._held), ""
        return (held.rstrip(), "") if self.inside else ("", held)

    def _open(self) -> bool:
        """Take the opening tag off where it comes first; False while there is too little to tell."""
        start, opening = self._held.lstrip(), self._style.opening
        if start.startswith(opening):
            self._held, self.inside, self._bare = start.removeprefix(opening), True, True
        elif opening.startswith(start):
            return False
        self._may_open = False
        return True

    def _think(self) -> str:
        closing = self._style.closing
        thoughts, found, rest = self._held.partition(closing)
        if not found:
            certain = thoughts[: len(thoughts) - _overlap(thoughts, closing)].rstrip()
            self._held = thoughts[len(certain) :]
            return self._shown(certain)
        shown = self._shown(thoughts.rstrip())
        self._held, self.inside, self._bare = rest, False, True
        return shown

    def _answer(self) -> str:
        *certain, rest = self._dropped.split(self._held)
        end = len(rest) - max((_overlap(rest, tag) for tag in self._style.dropped), default=0)
        self._held = rest[end:]
        return self._shown("".join(certain) + rest[:end])

    def _shown(self, text: str) -> str:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return text


class AnswerText:
    """The growing answer of one request; knows no backend and no clock.

    `stopped` is set at a stop string, `verdict` is set when the guard speaks. Stop strings are looked for in the
    answer; in the reasoning only if `stop_reasoning`. White space at the answer's start is the template's, and left
    out unless `keep_space`. `tags` gives bytes to control tokens that mark reasoning: as tokens they have no text, and
    the splitter would not see them.
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        splitter: ReasoningSplitter | None = None,
        guard: Guard | None = None,
        tags: Mapping[int, bytes] | None = None,
        *,
        keep_space: bool = False,
        stop_reasoning: bool = False,
    ) -> None:
        self.verdict: GuardVerdict | None = None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0
        self._splitter = splitter
        self._guard = guard
        self._tags = tags or {}
        self._keep_space, self._stop_reasoning = keep_space, stop_reasoning
        self._cut = b""  # the beginning of a character whose other bytes have not come yet
        self._stops = StopStrings(stop)
        self._plain = splitter is None and not stop
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._pending: list[TokenLogprob] = []

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._stops.met

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

    @property
    def may_lag(self) -> bool:
        """Whether a token may be taken before the one in front of it was read: what comes next depends on no text."""
        return self._splitter is None

    def feed(self, token: int, piece: bytes, logprob: TokenLogprob | None = None) -> list[TextDelta]:
        """Take one token in and read it."""
        self.take(token, logprob)
        return self.read(token, piece)

    def take(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take one token in, which `read` is called with next."""
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
            self._pending.append(logprob)

    def write(self, text: str, tokens: Iterable[int]) -> list[TextDelta]:
        """The answer, which these tokens stand for, behind all of the reasoning."""
        deltas = self.finish()
        self.tokens += tokens
        return deltas + self._show(text)

    def read(self, token: int, piece: bytes) -> list[TextDelta]:
        """What may be shown now. Bytes that can be no character become U+FFFD."""
        data = self._cut + (piece or self._tags.get(token, b""))
        text, used = codecs.utf_8_decode(data, "replace")
        self._cut = data[used:]
        if self._guard is not None and self.verdict is None:
            self.verdict = self._guard.feed(token, text)
        if self._plain:
            return self._show(text) if text else []
        if self.thinking:
            self.reasoning_tokens += 1
        return self._split(text)

    def finish(self) -> list[TextDelta]:
        """Give what was held back, now that no more comes."""
        cut, self._cut = self._cut, b""
        deltas = self._split(cut.decode("utf-8", "replace"))
        if self._splitter is not None:
            held = self._stops.flush() if self._stop_reasoning else ""
            deltas += self._deltas(*self._splitter.feed(held)) + self._deltas(*self._splitter.finish())
        return deltas + self._show(self._stops.flush())

    def _split(self, text: str) -> list[TextDelta]:
        text = self._stops.feed(text) if self._stop_reasoning else text
        return self._deltas("", text) if self._splitter is None else self._deltas(*self._splitter.feed(text))

    def _deltas(self, reasoning: str, text: str) -> list[TextDelta]:
        deltas: list[TextDelta] = []
        if reasoning:
            self._reasoning.append(reasoning)
            deltas.append(TextDelta(reasoning, reasoning=True, logprobs=self._taken()))
        return deltas + self._show(self._stops.feed(text)) if text else deltas

    def _show(self, text: str) -> list[TextDelta]:
        if not self._text and not self._keep_space:
            text = text.lstrip()
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text, logprobs=self._taken() if self._pending else ())]

    def _taken(self) -> tuple[TokenLogprob, ...]:
        pending, self._pending = tuple(self._pending), []
        return pending
