"""Drawing tokens: the native sampler chain, with the grammar outside of it.

A grammar inside the chain would look at every token of the vocabulary at every step. Outside, the chain draws first
and the grammar looks at the one token drawn. Only when that is refused is drawn again, from what it permits. A chain
that cuts to its `top_k` first draws from so many of the best permitted tokens as from all of them, so the grammar is
asked about the best before it is asked about the whole vocabulary; where some score alike, the chain gets all, since
it depends on their places which of them it takes.

llama.cpp ends the process when a grammar is told to accept a token that it forbids, so each token is tested before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opsin.core.errors import BadGrammar, BadParameter
from opsin.native.candidates import best
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from opsin.core.sampling import SamplingParams
    from opsin.native.candidates import Ids
    from opsin.native.context import Context
    from opsin.native.model import Model

_MOST_KEPT = 128  # from here on a chain may order tokens otherwise
_TRIED = 256  # best tokens of which a grammar is asked first


class NativeSampler:
    """The sampler of one request; a child of the context, so it is closed before it."""

    def __init__(self, model: Model, context: Context, params: SamplingParams, seed: int, gbnf: str | None) -> None:
        self._llama = model.lib.llama
        self._context = context
        self._model = model
        self._penalties = params.repeat_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        self._greedy = params.temperature == 0 and not self._penalties
        only_forbids = all(bias == -np.inf for bias in params.logit_bias.values())
        self.greedy = self._greedy and gbnf is None and only_forbids
        self.forbidden: NDArray[np.intp] | None = None
        # How many of the best tokens the chain keeps before all else; 0: not known.
        self._keep = 0 if self._penalties or params.top_k > _MOST_KEPT else params.top_k
        chain = self._llama.llama_sampler_chain_init(self._llama.llama_sampler_chain_default_params())
        self._chain = Owned("sampler", chain, self._llama.llama_sampler_free, context.handle)
        self._grammar: Owned | None = None
        try:
            self._fill_chain(model, params, seed, with_grammar=gbnf is not None)
            if gbnf is not None:
                self._add_grammar(model, gbnf)
        except BaseException:
            self.close()
            raise

    def _fill_chain(self, model: Model, params: SamplingParams, seed: int, *, with_grammar: bool) -> None:
        llama, n_vocab = self._llama, model.n_vocab
        biases = self._biases(model, params, with_grammar=with_grammar)
        self._biased = np.array(list(biases), np.intp)
        self._bias = np.array(list(biases.values()), np.float32)
        self.forbidden = self._biased if biases else None
        if biases:
            array = (llama.llama_logit_bias * len(biases))(*biases.items())
            self._add(llama.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
        if self._penalties:
            last = self._context.limits.n_ctx if params.penalty_last_n < 0 else params.penalty_last_n
            self._add(
                llama.llama_sampler_init_penalties(
                    n_vocab, last, params.repeat_penalty, params.frequency_penalty, params.presence_penalty
                )
            )
        if params.temperature == 0:
            self._add(llama.llama_sampler_init_greedy())
            return
        if params.top_k > 0:
            self._add(llama.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1.0:
            self._add(llama.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0.0:
            self._add(llama.llama_sampler_init_min_p(params.min_p, 1))
        self._add(llama.llama_sampler_init_temp(params.temperature))
        self._add(llama.llama_sampler_init_dist(seed))

    def _add(self, sampler: int) -> None:
        self._llama.llama_sampler_chain_add(self._chain.pointer, sampler)

    @staticmethod
    def _biases(model: Model, params: SamplingParams, *, with_grammar: bool) -> dict[int, float]:
        biases = dict(params.logit_bias)
        for token, bias in biases.items():
            if not 0 <= token < model.n_vocab:
                raise BadParameter(
                    f"logit_bias names token {token}, but this model's tokens go from 0 to {model.n_vocab - 1}."
                )
            if np.isnan(bias) or bias == np.inf:
                raise BadParameter(f"logit_bias of token {token} must be a number, or -inf to forbid it.")
        if params.ignore_eos:
            if with_grammar:
                raise BadParameter("ignore_eos cannot be used with a grammar or a JSON schema: leave one of them out.")
            biases.update(dict.fromkeys(model.eog_tokens, -np.inf))
        return biases

    def _add_grammar(self, model: Model, gbnf: str) -> None:
        pointer = self._llama.llama_sampler_init_grammar(model.vocab, gbnf.encode(), b"root")
        if not pointer:
            raise BadGrammar("llama.cpp refuses this grammar: check that it has a rule named root.")
        self._grammar = Owned("grammar", pointer, self._llama.llama_sampler_free, self._context.handle)

    def sample(self, row: int) -> int:
        """Draw a token from the logits of batch row `row` (-1: the last), and remember it.

        Raises DecodeFailed when the row has no logits, BadGrammar when the grammar leaves this model no token.
        """
        logits = self._context.logits(row)
        if self._grammar is None and not self._greedy:
            return self._draw_natively(row)
        if self._greedy:
            token = int(self._scores(logits).argmax())
        else:
            # It would remember a token that the grammar refuses, which only penalties look at.
            token = self._draw_from_all(logits) if self._penalties else self._draw_natively(row)
        if self._grammar is not None:
            if not self._model.candidates.permits(self._grammar.pointer, token):
                token = self._draw_permitted(self._grammar.pointer, logits)
            if token not in self._model.eog_tokens:
                self._llama.llama_sampler_accept(self._grammar.pointer, token)
        if self._penalties:
            self._llama.llama_sampler_accept(self._chain.pointer, token)
        return token

    def _draw_natively(self, row: int) -> int:
        return int(self._llama.llama_sampler_sample(self._chain.pointer, *self._context.at(row)))

    def _scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the chain orders tokens by: the logits, with their biases."""
        if not len(self._biased):
            return logits
        scores = logits.copy()
        scores[self._biased] += self._bias
        return scores

    def _draw(self, logits: NDArray[np.float32], scores: NDArray[np.float32], ids: Ids) -> int | None:
        """Draw from `ids`, best first, as from the whole vocabulary; all tokens that are left out score less.

        None when that is not known to be the same: which of equal tokens are kept, and in which order, depends on how
        all others lie.
        """
        first = scores[ids[: self._keep + 1]]
        if not len(ids) or (first[1:] == first[:-1]).any():
            return None
        kept = ids[: self._keep]
        return self._model.candidates.draw(self._chain.pointer, kept, logits[kept])

    def _draw_from_all(self, logits: NDArray[np.float32]) -> int:
        return self._model.candidates.draw(self._chain.pointer, np.arange(len(logits)), logits)

    def _draw_permitted(self, grammar: int, logits: NDArray[np.float32]) -> int:
        """Draw from what the grammar permits. Raises BadGrammar when that is nothing."""
        scores = self._scores(logits)
        token = None
        if self._keep or self._greedy:
            # In a string most tokens are permitted: some of the best are all that the chain keeps.
            tried = best(scores, _TRIED)
            tried = tried[self._model.candidates.permitted(grammar, tried)]
            if self._greedy and len(tried):
                return int(tried[0])
            if 0 < self._keep < len(tried):
                token = self._draw(logits, scores, tried)
        if token is None:
            permitted = self._model.prefix_tree.permitted(self._model.candidates, grammar)
            ids = np.flatnonzero(permitted & (scores > -np.inf))
            if not len(ids):
                raise BadGrammar(
                    "The grammar allows no token of this model here: loosen the grammar or the logit_bias."
                )
            if self._greedy:
                return int(ids[scores[ids].argmax()])
            if self._keep:
                token = self._draw(logits, scores, ids[np.argsort(-scores[ids], kind="stable")])
            if token is None:
                token = self._draw_from_all(np.where(permitted, logits, np.float32(-np.inf)))
        return token

    def close(self) -> None:
        """Free it; twice does no harm."""
        if self._grammar is not None:
            self._grammar.close()
        self._chain.close()
