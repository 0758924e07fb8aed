"""Sampling tokens: llama.cpp's sampler chain, over the tokens that the answer's constraint permits.

The chain samples first, as in llama.cpp itself. Only if the constraint refuses the token, the mask of permitted tokens
is applied to the logits and the chain samples again: permitting one token takes microseconds, a mask far longer.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.answer import TokenLogprob
from opsin.core.errors import BadParameter, ConstraintFailed
from opsin.core.request import SamplingParams
from opsin.native.constraint import Constraint
from opsin.native.model import Model, Owned

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
NOT_A_NUMBER = (
    "The language model computed a value that is not a number: the model file may be damaged, so download it again."
)
_NEAR, _FEW = (8.0, 12.0, 16.0), 4096  # so far below the best logit a trained model has dozens to hundreds of tokens


class NativeSampler(Owned):
    """The sampler of one request, closed before its context. Raises BadParameter.

    `logits` gives those of a batch row, as a view. `greedy` says that the sampler takes the most likely token that is
    not in `forbidden`, and nothing else; `needs`, how many of the most likely tokens it looks at.
    """

    def __init__(
        self,
        model: Model,
        context: Owned,
        logits: Callable[[int], NDArray[np.float32]],
        params: SamplingParams,
        seed: int,
        *,
        constraint: Constraint | None,
    ) -> None:
        self._llama = llama = model.lib.llama
        self._logits, self._constraint = logits, constraint
        self._eog_tokens = model.eog_tokens
        self._weighs = params.confidence and constraint is not None
        self.permitted: tuple[float, bool] | None = None
        """With `params.confidence`, see `TokenLogprob`, of the last token."""
        self._before_end = 0 if constraint else params.min_tokens
        biases = _biases(model, params, constrained=constraint is not None)
        penalties = params.repeat_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        self._plain = params.temperature == 0 and not (penalties or biases)
        self._mask_first = penalties  # which remember each token that the chain samples
        self._top_k = 0 if penalties or biases or params.temperature == 0 else params.top_k
        self.forbidden = np.array([token for token, bias in biases.items() if bias == -np.inf], np.intp)
        simple = not penalties and len(self.forbidden) == len(biases) and constraint is None and not self._before_end
        self.greedy = simple and params.temperature == 0
        few = 1 if self.greedy else params.top_k
        reads = params.logprobs is not None or params.confidence or bool(params.labels)
        self.needs = few + len(self.forbidden) if simple and few and not reads else model.n_vocab
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        super().__init__("sampler", chain, llama.llama_sampler_free, context)
        samplers = []
        if biases:
            array = (llama.llama_logit_bias * len(biases))(*biases.items())
            samplers.append(llama.llama_sampler_init_logit_bias(model.n_vocab, len(biases), array))
        if penalties:
            last = llama.llama_n_ctx(context.pointer) if params.penalty_last_n < 0 else params.penalty_last_n
            strengths = params.repeat_penalty, params.frequency_penalty, params.presence_penalty
            samplers.append(llama.llama_sampler_init_penalties(model.n_vocab, last, *strengths))
        if params.temperature == 0:
            samplers.append(llama.llama_sampler_init_greedy())
        else:
            samplers += [  # each does nothing at its neutral value
                llama.llama_sampler_init_top_k(params.top_k),
                llama.llama_sampler_init_top_p(params.top_p, 1),
                llama.llama_sampler_init_min_p(params.min_p, 1),
                llama.llama_sampler_init_temp(params.temperature),
                llama.llama_sampler_init_dist(seed),
            ]
        for sampler in samplers:
            llama.llama_sampler_chain_add(chain, sampler)

    def sample(self, row: int) -> int:
        """Sample a token from the logits of batch row `row` (-1: the last), and remember it.

        Raises DecodeFailed when the row has no logits, ConstraintFailed when no token can follow.
        """
        logits, constraint = self._logits(row), self._constraint
        if constraint is None:
            if self._before_end:
                self._before_end -= 1
                logits[list(self._eog_tokens)] = -np.inf
            return self._sampled(logits)
        raw = logits.copy() if self._weighs else logits
        token = -1 if self._mask_first else self._sampled(logits)
        if token < 0 or not constraint.permits(token):
            np.copyto(logits, -np.inf, where=~constraint.mask(self.forbidden))
            while not constraint.keeps_unique(token := self._sampled(logits)):
                logits[token] = -np.inf
                if logits.max() == -np.inf:
                    raise ConstraintFailed("Every item that may follow is in this array already: it wants them unique.")
        if self._weighs:  # before it is taken in
            mask = constraint.mask(self.forbidden)
            self.permitted = float(raw[token]) - log_norm(raw[mask]), not mask[raw.argmax()]
        if token not in self._eog_tokens:
            constraint.accept(token)
        return token

    def _sampled(self, logits: NDArray[np.float32]) -> int:
        if self._plain:
            return int(logits.argmax())
        few = most_likely(logits, self._top_k) if self._top_k else None
        token = self.draw(candidates(np.arange(len(logits)), logits) if few is None else few)
        if self._mask_first:
            self._llama.llama_sampler_accept(self.pointer, token)
        return token

    def draw(self, tokens: NDArray[Any]) -> int:
        """What the chain draws from these `candidates` alone, which it changes; a whole vocabulary takes it far longer.

        Their logits are numbers: sorting others is undefined in the native samplers.
        """
        llama = self._llama
        first = ctypes.cast(tokens.ctypes.data, ctypes.POINTER(llama.llama_token_data))
        array = llama.llama_token_data_array(first, len(tokens), -1, False)
        llama.llama_sampler_apply(self.pointer, ctypes.byref(array))
        return int(array.data[array.selected].id)


def candidates(tokens: NDArray[Any], logits: NDArray[np.float32]) -> NDArray[Any]:
    """`llama_token_data` of these tokens, whose logits are given in the same order."""
    found = np.zeros(len(tokens), _TOKEN)
    found["id"], found["logit"] = tokens, logits
    return found


def log_norm(logits: NDArray[np.float32]) -> float:
    """The logarithm of the sum of all exponentials; summed in float64, as float32 loses the fourth of 150,000 terms."""
    peak = logits.max()
    return float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def token_logprob(logits: NDArray[np.float32], token: int, top: int, piece: Callable[[int], bytes]) -> TokenLogprob:
    """The log probability of `token`, and the `top` most likely tokens, best first, ties by token id.

    `logits` is float32 [n_vocab].
    """
    norm = log_norm(logits)
    order = np.array([], np.intp)
    if top := min(top, len(logits)):
        few = most_likely(logits, top)
        chosen = np.argpartition(logits, -top)[-top:] if few is None else few["id"]
        order = chosen[np.lexsort((chosen, -logits[chosen]))][:top]
    best = tuple((int(one), piece(int(one)), float(logits[one]) - norm) for one in order)
    return TokenLogprob(token, piece(token), float(logits[token]) - norm, best)


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[Any] | None:
    """The `count` most likely tokens and some more, in the order of their ids; None where that is no quick way.

    The chain's own top_k chooses among them.
    """
    best = logits.max()
    for near in _NEAR:
        likely = logits >= best - near
        if count <= np.count_nonzero(likely) <= _FEW:
            chosen = np.flatnonzero(likely)
            return candidates(chosen, logits[chosen])
    return None


def _biases(model: Model, params: SamplingParams, *, constrained: bool) -> dict[int, float]:
    biases = dict(params.logit_bias)
    for token, bias in biases.items():
        if not 0 <= token < model.n_vocab or np.isnan(bias) or bias == np.inf:
            raise BadParameter(
                f"logit_bias of token {token} cannot be used: this model's tokens go from 0 to {model.n_vocab - 1}, "
                "and a bias must be a number, or -inf to forbid the token."
            )
    if params.ignore_eos:
        if constrained:
            raise BadParameter("ignore_eos cannot be used with a grammar or a JSON schema: leave one of them out.")
        biases.update(dict.fromkeys(model.eog_tokens, -np.inf))
    return biases
