"""Sampling tokens: llama.cpp's sampler chain, over the tokens that the answer's constraint permits.

The mask is applied to the logits before the chain sees them, so that its cuts (top_k, top_p, min_p) look at permitted
tokens alone. A chain without cuts is asked first, and the mask only made when the constraint refuses its token: the
distribution is the same, and a token is permitted or refused in a microsecond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from opsin.core.errors import BadParameter, ConstraintFailed
from opsin.native.handles import Owned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from opsin.core.sampling import SamplingParams
    from opsin.native.constraint import Constraint
    from opsin.native.context import Context
    from opsin.native.model import Model

_TRIED = 256  # best tokens of which a grammar is asked one by one


class NativeSampler:
    """The sampler of one request; a child of the context, so it is closed before it.

    `greedy` says that it takes the most likely token and nothing else, so that many can be sampled at once; `forbidden`
    are the tokens it never takes (None: any may come).
    """

    def __init__(
        self, model: Model, context: Context, params: SamplingParams, seed: int, constraint: Constraint | None
    ) -> None:
        self._llama = model.lib.llama
        self._context = context
        self._constraint = constraint
        self._eog_tokens = model.eog_tokens
        biases = _biases(model, params, constrained=constraint is not None)
        penalties = params.repeat_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        cuts = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
        only_forbids = all(bias == -np.inf for bias in biases.values())
        self._plain = params.temperature == 0 and not (penalties or biases)
        self.greedy = params.temperature == 0 and not penalties and only_forbids and constraint is None
        self._ask_first = not (penalties or cuts)
        # How many of the best tokens the chain keeps before all else; 0: not known.
        self._keep = params.top_k if cuts and not (penalties or biases) and model.n_vocab > _TRIED else 0
        self._keep_logits = params.logprobs is not None
        self._forbidden = np.array([token for token, bias in biases.items() if bias == -np.inf], np.intp)
        self.forbidden = self._forbidden if biases else None
        chain = self._llama.llama_sampler_chain_init(self._llama.llama_sampler_chain_default_params())
        self._chain = Owned("sampler", chain, self._llama.llama_sampler_free, context.handle)
        self._fill_chain(model, params, seed, biases, penalties=penalties)

    def _fill_chain(
        self, model: Model, params: SamplingParams, seed: int, biases: dict[int, float], *, penalties: bool
    ) -> None:
        llama, n_vocab = self._llama, model.n_vocab
        if biases:
            array = (llama.llama_logit_bias * len(biases))(*biases.items())
            self._add(llama.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
        if penalties:
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

    def sample(self, row: int) -> int:
        """Sample a token from the logits of batch row `row` (-1: the last), and remember it.

        Raises DecodeFailed when the row has no logits, ConstraintFailed when no token can follow.
        """
        logits = self._context.logits(row)
        if self._constraint is None:
            return self._sampled(logits, row)
        token = self._sampled(logits, row) if self._ask_first else -1
        if token < 0 or not self._constraint.permits(token):
            kept = logits.copy() if self._keep_logits else None
            np.copyto(logits, -np.inf, where=~self._mask(self._constraint, logits))
            token = self._sampled(logits, row)
            while not self._constraint.keeps_unique(token):
                logits[token] = -np.inf
                if logits.max() == -np.inf:
                    raise ConstraintFailed(
                        "Each item that could follow is in this array already, and it wants them unique."
                    )
                token = self._sampled(logits, row)
            if kept is not None:
                logits[:] = kept  # log probabilities are those of the model, before any sampler
        if token not in self._eog_tokens:
            self._constraint.accept(token)
        return token

    def _mask(self, constraint: Constraint, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The permitted tokens, or as many of the best of them as the chain keeps anyway."""
        if self._keep and constraint.masks_slowly:
            tried = np.argpartition(logits, -_TRIED)[-_TRIED:]
            best_first = tried[np.argsort(-logits[tried], kind="stable")]
            permitted = constraint.permitted(best_first.tolist(), self._keep)
            if len(permitted) >= self._keep:
                mask = np.zeros(len(logits), np.bool_)
                mask[permitted] = True
                return mask
        return constraint.mask(self._forbidden)

    def _sampled(self, logits: NDArray[np.float32], row: int) -> int:
        if self._plain:
            return int(logits.argmax())
        return int(self._llama.llama_sampler_sample(self._chain.pointer, *self._context.at(row)))

    def close(self) -> None:
        """Free it; twice does no harm."""
        self._chain.close()


def _biases(model: Model, params: SamplingParams, *, constrained: bool) -> dict[int, float]:
    biases = dict(params.logit_bias)
    for token, bias in biases.items():
        if not 0 <= token < model.n_vocab:
            raise BadParameter(
                f"logit_bias names token {token}, but this model's tokens go from 0 to {model.n_vocab - 1}."
            )
        if np.isnan(bias) or bias == np.inf:
            raise BadParameter(f"logit_bias of token {token} must be a number, or -inf to forbid it.")
    if params.ignore_eos:
        if constrained:
            raise BadParameter("ignore_eos cannot be used with a grammar or a JSON schema: leave one of them out.")
        biases.update(dict.fromkeys(model.eog_tokens, -np.inf))
    return biases
