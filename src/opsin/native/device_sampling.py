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
from opsin.native.sampler import NativeSampler, candidates

MOST = 64
"""The most likely tokens that are read of each row. `top_k` is 40 where nobody says another number."""
_FEW = f"Row {{row}} of the last batch has its {MOST} most likely tokens only."
_PATIENCE = 32  # decode calls that others would suit better, before they change


class DeviceSampling:
    """The samplers behind the logits of `sequences` sequence ids. They are the context's, and closed with it."""

    def __init__(self, llama: Any, context: Owned, sequences: int, n_vocab: int) -> None:
        self._llama, self._context, self._n_vocab = llama, context, n_vocab
        self._chains: list[Owned] = []
        self._sequences = sequences
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
        if self.draws:
            likely = self._likely(row)
            if likely is not None and sampler.needs > MOST:
                raise DecodeFailed(_FEW.format(row=row))
            return None if likely is None else sampler.draw(likely)
        if not sampler.greedy:
            return None
        pointer, llama = self._context.pointer, self._llama
        token: int = llama.llama_get_sampled_token_ith(pointer, row)
        # Below 0 if the device cannot do it; where no logit is a number, any token. Of two equal ones it may be either.
        if (
            token < 0
            or token in sampler.forbidden
            or math.isnan(llama.llama_get_sampled_logits_ith(pointer, row)[token])
        ):
            return None
        return token

    def logits(self, row: int) -> NDArray[np.float32]:
        """All logits of that batch row, a view of native memory. Raises DecodeFailed where there are none."""
        pointer, llama = self._context.pointer, self._llama
        if llama.llama_get_sampled_logits_count_ith(pointer, row) != self._n_vocab:
            raise DecodeFailed(_FEW.format(row=row))
        return floats(llama.llama_get_sampled_logits_ith(pointer, row), self._n_vocab)

    def _likely(self, row: int) -> NDArray[Any] | None:
        """The candidates of a row; None if the device cannot choose, and gives all logits."""
        pointer, llama = self._context.pointer, self._llama
        count = llama.llama_get_sampled_candidates_count_ith(pointer, row)
        if not count:
            return None
        first = llama.llama_get_sampled_candidates_ith(pointer, row)
        ids = np.frombuffer((ctypes.c_int32 * count).from_address(ctypes.addressof(first.contents)), np.int32)
        order = ids.argsort()  # as the host has them, so that it draws the same
        return candidates(ids[order], floats(llama.llama_get_sampled_logits_ith(pointer, row), count)[order])
