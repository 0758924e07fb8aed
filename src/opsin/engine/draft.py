"""Drafts: what an answer may go on with, where the same tokens came before.

They are looked for in the prompt and the answer, as in prompt lookup (Saxena, "Prompt Lookup Decoding", 2023),
and in earlier answers: those to one JSON schema share many tokens. A draft is decoded in one ubatch with the token in
front of it, and sampled position by position while each sample is its next token: the answer is the one without drafts.
"""

from collections.abc import Iterable, Sequence

from opsin.core.request import Chunk, TextChunk

_GRAMS = (6, 3)  # so many tokens, in that order, must have come before: the longer first
_BREAK = -1  # between two answers, and where an image is
_KEEP = 0.9  # what a step leaves of the weight of those before it


class Lookup:
    """Tokens in order, and the place behind each group of `_GRAMS` that came last."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    def extend(self, new: Iterable[int]) -> None:
        """Put tokens at the end."""
        for token in new:
            for size in _GRAMS:
                if len(self.tokens) >= size:
                    self._behind[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)

    def after(self, group: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` tokens that came after a group, () if it is not known; what ends here repeats itself."""
        place = self._behind.get(tuple(group))
        if place is None:
            return ()
        period = len(self.tokens) - place
        found = tuple(self.tokens[place + at % period] for at in range(count))
        return found[: found.index(_BREAK)] if _BREAK in found else found


class Drafter:
    """Guesses how one answer goes on; used by one thread. `drafted` and `accepted` count tokens of its drafts.

    `odds` (0 to 1) is how likely the next token of a guess is right if all before it are, as the last steps say: the
    guesses of steps without a draft count, too.
    """

    def __init__(self, prompt: Iterable[Chunk], earlier: Lookup, odds: float) -> None:
        self._own, self._earlier = Lookup(), earlier
        for chunk in prompt:
            self._own.extend(chunk.tokens if isinstance(chunk, TextChunk) else (_BREAK,))
        self._begin = tuple(self._own.tokens[-_GRAMS[0] :])
        self._read = 0
        self._guess: tuple[int, ...] = ()
        self._right, self._tried = odds, 1.0
        self.odds = odds
        self.drafted = self.accepted = 0

    def guess(self, answer: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may follow the answer so far; () where nothing like its end came before."""
        new, self._read = answer[self._read :], len(answer)
        self._own.extend(new)
        right = 0
        while right < min(len(self._guess), len(new)) and self._guess[right] == new[right]:
            right += 1
        if tried := min(right + 1, len(self._guess), len(new)):
            self._right, self._tried = _KEEP * self._right + right, _KEEP * self._tried + tried
            self.odds = self._right / self._tried
        last = self._own.tokens[-_GRAMS[0] :]
        found = (lookup.after(last[-size:], count) for size in _GRAMS for lookup in (self._own, self._earlier))
        self._guess = next(filter(None, found), ())
        return self._guess

    def end(self, answer: Sequence[int], last: int) -> None:
        """The answer is complete, with `last` the token that ended it: others may go on like it."""
        self._earlier.extend((*self._begin, *answer, *(() if answer[-1:] == [last] else (last,)), _BREAK))
