"""Drawing tokens: the native sampler chain, with the grammar outside of it.

A grammar inside the chain would look at every token of the vocabulary at every step. Outside, the chain draws first
and the grammar looks at the one token drawn; only when that is refused are all tokens masked and drawn again.
llama.cpp ends the process when a grammar is told to accept a token that it forbids, so each token is tested before.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.core.errors import BadGrammar, BadParameter
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from opsin.core.sampling import SamplingParams
    from opsin.native.context import Context
    from opsin.native.model import Model

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class NativeSampler:
    """The sampler of one request; a child of the context, so it is closed before it."""

    def __init__(self, model: Model, context: Context, params: SamplingParams, seed: int, gbnf: str | None) -> None:
        self._llama = model.lib.llama
        self._context = context
        self._eog = model.eog_tokens
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
        if biases:
            array = (llama.llama_logit_bias * len(biases))(*biases.items())
            self._add(llama.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
        if params.repeat_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
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
        self._ids = np.arange(model.n_vocab, dtype=np.int32)
        self._candidates = np.zeros(model.n_vocab, _CANDIDATE)

    def sample(self, row: int) -> int:
        """Draw a token from the logits of batch row `row` (-1: the last), and remember it.

        Raises DecodeFailed when the row has no logits, BadGrammar when the grammar leaves this model no token.
        """
        chain = self._chain.pointer
        logits = self._context.logits(row)
        if self._grammar is None:
            return int(self._llama.llama_sampler_sample(chain, *self._context.at(row)))
        token = self._draw(logits, masked=False)
        if not self._allowed(token):
            token = self._draw(logits, masked=True)
            if not self._allowed(token):
                raise BadGrammar(
                    "The grammar allows no token of this model here: loosen the grammar or the logit_bias."
                )
        self._llama.llama_sampler_accept(chain, token)
        if token not in self._eog:
            self._llama.llama_sampler_accept(self._grammar.pointer, token)
        return token

    def _draw(self, logits: Any, *, masked: bool) -> int:
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = logits
        candidates["p"] = 0.0
        array = self._array(candidates)
        if masked and self._grammar is not None:
            self._llama.llama_sampler_apply(self._grammar.pointer, ctypes.byref(array))
        self._llama.llama_sampler_apply(self._chain.pointer, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        array = self._array(one)
        self._llama.llama_sampler_apply(self._owned_grammar(), ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))

    def _owned_grammar(self) -> int:
        assert self._grammar is not None
        return self._grammar.pointer

    def _array(self, candidates: Any) -> Any:
        data = candidates.ctypes.data_as(ctypes.POINTER(self._llama.llama_token_data))
        return self._llama.llama_token_data_array(data, len(candidates), -1, False)

    def close(self) -> None:
        """Free it; twice does no harm."""
        if self._grammar is not None:
            self._grammar.close()
        self._chain.close()
