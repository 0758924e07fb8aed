"""What a drawn token means for its answer: text for the caller, or one of the ends an answer can have."""

from __future__ import annotations

from collections.abc import Callable

from opsin.core.answer import TokenLogprob
from opsin.core.stages import Stage
from opsin.engine.sequence import Sequence


class Absorber:
    """The token policy; used by the engine's thread alone.

    `piece` gives a token's bytes, `eog_tokens` end a turn, `n_ctx` is the KV memory of a sequence in cells,
    `close_reasoning` gives the tokens that close a reasoning block whose budget is spent.
    """

    def __init__(
        self,
        piece: Callable[[int], bytes],
        eog_tokens: frozenset[int],
        n_ctx: int,
        close_reasoning: Callable[[Sequence], list[int]],
    ) -> None:
        self._piece = piece
        self._eog_tokens = eog_tokens
        self._n_ctx = n_ctx
        self._close_reasoning = close_reasoning

    def absorb(self, sequence: Sequence, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """Take one token in, deliver what it shows, and end the answer where a rule says so."""
        params = sequence.request.params
        sequence.last_token = token
        if token in self._eog_tokens and not params.ignore_eos:
            sequence.end("stop")
            return
        with sequence.clock.stage(Stage.DETOKENIZE):
            for delta in sequence.output.feed(token, self._piece(token), logprob):
                sequence.stream.deliver(delta)
        self._check_ends(sequence)
        check_deadline(sequence, now)
        budget = params.max_thinking_tokens
        if budget is not None and sequence.output.thinking and sequence.output.reasoning_tokens == budget:
            sequence.forced = self._close_reasoning(sequence)

    def _check_ends(self, sequence: Sequence) -> None:
        output = sequence.output
        if output.stopped:
            sequence.end("stop")
        elif output.verdict is not None:
            sequence.end("length", "guard")
        elif len(output.tokens) >= sequence.request.max_tokens:
            sequence.end("length", "tokens")
        elif sequence.n_cells >= self._n_ctx:
            sequence.end("length", "context")


def check_deadline(sequence: Sequence, now: float) -> None:
    """End an answer whose time is over; what it has so far is kept."""
    deadline = sequence.request.deadline
    if deadline is not None and now >= deadline:
        sequence.end("length", "seconds")
