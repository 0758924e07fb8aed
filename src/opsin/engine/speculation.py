"""When a draft is worth its rows."""

import math
from collections.abc import Callable

from opsin.core.backend import BackendLimits
from opsin.engine.draft import Drafter, Lookup
from opsin.engine.request import Sequence, State
from opsin.engine.step import Tokens

_LONGEST = 7
_MOST_ROWS = 32  # of a step with drafts; every backend gives logits of so many
FASTEST = 0.002  # seconds: of a step that takes less, the engine's own work is too large a part to save any
_PACE = 0.1  # weight of the last step in what steps cost
_REMEMBERED = 16_384  # tokens of earlier answers under one salt; then it begins anew, and with the ninth salt


class Speculation:
    """Gives each of a few sequences that answer a draft as long as it pays, which depends on measured times.

    A draft's token pays if it is right more often than `price`, the time of its row by that of a step without drafts.
    So drafts grow with the odds of their sequence, and there are none where the odds are bad, rows dear, or sequences
    many: all of them wait for a step, and a token more is one of them all. At most `most` may answer.
    """

    def __init__(self, limits: BackendLimits, most: int) -> None:
        # A draft is cut off where it is wrong, which one state for all tokens does not allow.
        self._most = most if limits.forks else 0
        self._limits = limits
        self._seconds: dict[int, float] = {}  # of a step without drafts, by sequences
        self._earlier: dict[str, Lookup] = {}
        self._odds = 0.5  # of requests so far, for the next one
        self.price = 0.3

    def drafts(self, answering: tuple[Sequence, ...], room: int) -> tuple[tuple[int, ...], ...]:
        """A draft for each, () for none at all; `room` are the free cells of the KV cache."""
        if len(answering) > self._most or self._seconds.get(len(answering), 0.0) < FASTEST:
            return ()
        rows = min(_MOST_ROWS, room, self._limits.n_ubatch) - len(answering)
        drafts = []
        for sequence in answering:
            drafts.append(self._draft(sequence, rows, self.price * len(answering)))
            rows -= len(drafts[-1])
        return tuple(drafts) if any(drafts) else ()

    def learn(self, step: Tokens, seconds: float) -> None:
        """A step without prompts took so long."""
        plain = self._seconds.setdefault(len(step.decode), seconds)
        if step.drafted:
            price = (seconds / plain - 1) / step.drafted
            self.price += _PACE * (min(max(price, 0.01), 2.0) - self.price)
        else:
            self._seconds[len(step.decode)] = plain + _PACE * (min(seconds, 2 * plain) - plain)

    def ended(self, sequence: Sequence) -> None:
        """An answer is complete."""
        if sequence.drafter is not None:
            sequence.drafter.end(sequence.output.tokens, sequence.last_token)

    def _draft(self, sequence: Sequence, rows: int, price: float) -> tuple[int, ...]:
        tokens, drafter = sequence.output.tokens, sequence.drafter
        if sequence.compiled is not None and sequence.output.thinking:
            return ()  # behind the reasoning another sampler begins, for which the batch may not have the logits
        if drafter is None:
            earlier = self._earlier_answers(sequence.request.salt)
            drafter = sequence.drafter = Drafter(sequence.tokenized.chunks, earlier, self._odds)
        left = min(sequence.request.max_tokens - len(tokens), self._limits.n_ctx_seq - sequence.n_cells) - 1
        guess, odds = drafter.guess(tokens, _LONGEST), drafter.odds
        self._odds += _PACE * (odds - self._odds)
        if price >= odds:
            self.price *= 0.9998  # so that it is asked for again some time
            return ()
        # Its odds to the power of n are those of the draft's n-th token.
        worth = _LONGEST if odds >= 1 else int(math.log(price) / math.log(odds))
        return () if sequence.forced else guess[: max(0, min(worth, rows, left))]

    def _earlier_answers(self, salt: str) -> Lookup:
        if salt not in self._earlier and len(self._earlier) == 8:
            self._earlier.clear()
        if salt not in self._earlier or len(self._earlier[salt].tokens) > _REMEMBERED:
            self._earlier[salt] = Lookup()
        return self._earlier[salt]


def verify(step: Tokens, sample: Callable[[Sequence, int], None], forget: Callable[[Sequence, int, int], None]) -> int:
    """Sample behind each token of a draft that was sampled itself, and forget the others; gives how many there were.

    `sample` gets a row of the batch, `forget` how many tokens a draft had and how many of them were right.
    """
    row, accepted = len(step.decode), 0
    for sequence, draft in zip(step.decode, step.drafts, strict=True):
        right = 0
        while right < len(draft) and sequence.state is State.DECODE and sequence.last_token == draft[right]:
            sample(sequence, row + right)
            right += 1
        if draft:
            forget(sequence, len(draft), right)
        row += len(draft)
        accepted += right
    return accepted
