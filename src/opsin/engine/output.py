"""What the tokens of a step mean for their answers: text for the caller, or one of the ends an answer can have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opsin.core.answer import TokenLogprob
from opsin.engine.request import Sequence


class OutputProcessor:
    """The rules for ends; used by the engine's thread alone.

    `piece` gives a token's bytes, `eog_tokens` end a turn, `n_ctx` is what the KV cache holds of a sequence, in cells,
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

    def process_output(self, sampled: Iterable[tuple[Sequence, int, TokenLogprob | None]]) -> None:
        """Take the tokens of a step in, put what they show into the streams, and end answers where a rule says so."""
        eog_tokens, piece, n_ctx = self._eog_tokens, self._piece, self._n_ctx
        for sequence, token, logprob in sampled:
            request, output, stream = sequence.request, sequence.output, sequence.stream
            sequence.last_token = token
            if token in eog_tokens and not request.params.ignore_eos:
                sequence.end("stop")
                continue
            for delta in output.feed(token, piece(token), logprob):
                stream.add(delta)
            if output.stopped:
                sequence.end("stop")
            elif output.verdict is not None:
                sequence.end("length", "guard")
            elif len(output.tokens) >= request.max_tokens:
                sequence.end("length", "tokens")
            elif sequence.n_cells >= n_ctx:
                sequence.end("length", "context")
            elif request.params.max_thinking_tokens is not None:
                self.limit_reasoning(sequence)

    def limit_reasoning(self, sequence: Sequence) -> None:
        """Close a reasoning block whose budget is spent; a budget of 0 closes one that the prompt opened."""
        budget, output = sequence.request.params.max_thinking_tokens, sequence.output
        if budget is not None and output.thinking and output.reasoning_tokens == budget:
            sequence.forced = self._close_reasoning(sequence)


def check_deadline(sequence: Sequence, now: float) -> None:
    """End an answer whose time is over; what it has so far is kept."""
    deadline = sequence.request.deadline
    if deadline is not None and now >= deadline:
        sequence.end("length", "seconds")
