"""How the time is shared between streams and the work beside them, as past steps took it."""

from opsin.core.backend import BackendLimits
from opsin.engine.policy import Policy
from opsin.engine.step import Encode, Step, Tokens, cells_needed, low_rows, priority_of

_FEWEST_ROWS = 32
"""Rows of a prefill step that reads all weights once. On a CPU 16 of them cost a quarter more each, for a 1 B model.
A whole tile is cheaper by a quarter or more, as attention in tiles is: taken unless it lasts `_LONGEST_SLICE` seconds.
"""
_LONGEST_SLICE = 0.75


class Pace:
    """Knows how long steps take, and so whose turn it is; times in seconds, `now` on the engine's clock.

    Beside work of low priority live streams have `policy.low_stream_share` of the time: what they have not had yet is
    owed to them.
    """

    def __init__(self, limits: BackendLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        self._last_decode = float("-inf")
        self._step_seconds = self._row_seconds = self._owed = 0.0
        self._asked: float | None = None
        self._kept_waiting = False

    @property
    def behind(self) -> bool:
        """Whether live streams come before any work of low priority."""
        return self._owed > self._step_seconds

    def learn(self, step: Step, now: float, seconds: float, *, live: bool, streams: bool) -> None:
        """A step took so long; before it somebody was being answered (`streams`), or a live request was (`live`)."""
        decode = () if isinstance(step, Encode) else step.decode
        image = not isinstance(step, Tokens)
        self._kept_waiting = image and not decode
        self._asked = None if image else now
        if isinstance(step, Tokens) and decode and not step.prefill and not step.branches:
            self._step_seconds = seconds
        rows = cells_needed(step)
        if (image or not decode) and rows >= _FEWEST_ROWS:  # fewer cost nearly as much as so many
            self._row_seconds = seconds / rows
        if decode or not streams:
            self._last_decode = now  # a first token counts: its stream has not waited yet
        if not live:
            self._owed = 0.0
        elif not self._policy.rows_cost and priority_of(step) < 0:
            self._owe(seconds)
        elif not self._policy.rows_cost:
            self._owed = max(0.0, self._owed - seconds * bool(decode))
        elif rows:  # an encode told of itself piece by piece
            self._owe(seconds * low_rows(step) / rows)
            self._owed = max(0.0, self._owed - seconds * sum(s.request.priority >= 0 for s in decode) / rows)

    def due(self, now: float, served: int, sliced: float | None) -> bool:
        """Whether streams waited long enough for a slice of an image, while so many are `served`.

        When most of another one, which takes `sliced` seconds or is whole (None), would end too late, it waits.
        """
        return self._kept_waiting and self._is_due(now, served, self._row_seconds * self.rows(sliced))

    def due_in_encode(self, now: float, priority: int, served: int) -> bool:
        """The same between two layers of an encode of that priority."""
        # Asked again and again: the next time is as far ahead as the last one is behind.
        piece = 0.0 if self._asked is None else now - self._asked
        self._asked = now
        if priority < 0:
            self._owe(piece)
            return self.behind
        return self._is_due(now, served, piece)

    def rows(self, seconds: float | None) -> int:
        """The most rows of a prefill step that may take so long."""
        most = self._limits.n_ubatch
        if seconds is not None:
            most = self._policy.slice
            if self._row_seconds > 0:
                fewest = max(_FEWEST_ROWS, self._limits.tile)
                if self._row_seconds * fewest > _LONGEST_SLICE:
                    fewest = _FEWEST_ROWS
                most = max(min(most, fewest), int(seconds / self._row_seconds))
        return max(1, min(most, self._limits.n_ubatch))

    def crowded(self, seconds: float, served: int) -> float:
        """How long a stream may be held up, when it is `seconds` while few are served."""
        crowd = max(1.0, served / self._policy.few)
        return max(seconds, min(self._policy.crowded_wait, crowd**2 * seconds))

    def _is_due(self, now: float, served: int, ahead: float) -> bool:
        policy = self._policy
        share = min(policy.longest_wait, self._step_seconds / policy.stream_share)
        return now + 0.75 * ahead - self._last_decode >= max(policy.shortest_wait, self.crowded(share, served))

    def _owe(self, seconds: float) -> None:
        share = self._policy.low_stream_share
        self._owed += seconds * share / (1.0 - share)
