"""Sampling where the logits are: llama.cpp's backend sampling, so that nobody on the host looks through a vocabulary.

`llama_set_sampler` (llama.h, experimental) puts samplers behind the logits of a sequence, into the graph. Each change
of one makes llama.cpp reserve its graphs anew, so all sequences have the same ones and keep them: the most likely
token, beside which all logits are copied to the host; or, while somebody draws and nobody needs more, the `MOST` most
likely tokens, beside which nothing is copied.
"""

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.core.errors import DecodeFailed
from opsin.native.model import Owned, floats
from opsin.native.sampler import NOT_A_NUMBER, NativeSampler, candidates

MOST = 64
"""The most likely tokens that are read of each row. `top_k` is 40 where nobody says another number."""
_FEW = f"Row {{row}} of the last batch has its {MOST} most likely tokens only."
_PATIENCE = 32  # decode calls that others would suit better, before they change


class DeviceSampling:
    """The samplers behind the logits of `sequences` sequence ids. They are the context's, and closed with it."""

    def __init__(self, llama: Any, context: Owned, sequences: int, n_vocab: int) -> None:
        self._llama, self._context, self._sequences, self._n_vocab = llama, context, sequences, n_vocab
        self._chains: list[Owned] = []
        self._waited = 0
        self.draws = False
        """Whether there are only the most likely tokens of each row, and no logits of the others."""
        self._attach()

    def prepare(self, samplers: Iterable[NativeSampler]) -> None:
        """Before a batch is decoded: what suits those who may sample from it."""
        open_ones = list(samplers)
        enough = all(one.needs <= MOST for one in open_ones)
        wanted = enough and not all(one.greedy for one in open_ones)
        self._waited = self._waited + 1 if wanted is not self.draws else 0
        if self._waited > (_PATIENCE if enough else 0):
            self.draws, self._waited = wanted, 0
            self._attach()

    def _attach(self) -> None:
        llama, old = self._llama, self._chains
        self._chains = []
        for seq_id in range(self._sequences):
            pointer = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
            chain = Owned("sampler on the device", pointer, llama.llama_sampler_free, self._context)
            sampler = llama.llama_sampler_init_top_k(MOST) if self.draws else llama.llama_sampler_init_greedy()
            llama.llama_sampler_chain_add(pointer, sampler)
            llama.llama_set_sampler(self._context.pointer, seq_id, pointer)
            self._chains.append(chain)
        for chain in old:
            chain.close()

    def sample(self, sampler: NativeSampler, row: int) -> int | None:
        """The token of that batch row; None if it takes all logits to tell. Raises DecodeFailed."""
        if self.draws and (likely := self._likely(row)) is not None:
            if sampler.needs > MOST:
                raise DecodeFailed(_FEW.format(row=row))
            return sampler.draw(likely)
        if self.draws or not sampler.greedy:
            return None
        token: int = self._sampled("token", row)
        # Below 0 if the device cannot do it; where no logit is a number, any token. Of two equal ones it may be either.
        usable = token >= 0 and token not in sampler.forbidden and not math.isnan(self._sampled("logits", row)[token])
        return token if usable else None

    def logits(self, row: int) -> NDArray[np.float32]:
        """All logits of a batch row, float32 [n_vocab], a view of native memory. Raises DecodeFailed if it has few."""
        if self._sampled("logits_count", row) != self._n_vocab:
            raise DecodeFailed(_FEW.format(row=row))
        return floats(self._sampled("logits", row), self._n_vocab)

    def _likely(self, row: int) -> NDArray[Any] | None:
        """The candidates of a row; None if the device cannot choose, and gives all logits. Raises DecodeFailed."""
        if not (count := self._sampled("candidates_count", row)):
            return None
        first = self._sampled("candidates", row)
        ids = np.frombuffer((ctypes.c_int32 * count).from_address(ctypes.addressof(first.contents)), np.int32)
        order = ids.argsort()  # as the host has them, so that it draws the same
        logits = floats(self._sampled("logits", row), count)[order]
        if np.isnan(logits.max()):
            raise DecodeFailed(NOT_A_NUMBER)
        return candidates(ids[order], logits)

    def _sampled(self, what: str, row: int) -> Any:
        return getattr(self._llama, f"llama_get_sampled_{what}_ith")(self._context.pointer, row)
