"""Sampling: seeds, greedy, biases, penalties, and log probabilities against NumPy."""

import collections
from typing import Any

import numpy as np
import pytest
from native_help import generate, prefill
from token_rows import TokenRow, batch

from opsin.core.errors import BadParameter, DecodeFailed
from opsin.core.request import SamplingParams, TextPart
from opsin.native.sampler import most_likely


def answer(backend: Any, params: SamplingParams, seed: int, count: int = 24) -> list[int]:
    backend.kv_remove(0, 0, -1)
    tokenized = backend.tokenize([TextPart("USER: hello ASSISTANT:")], add_bos=True)
    sampler = backend.sampler(params, seed)
    try:
        return generate(backend, sampler, prefill(backend, tokenized), count)
    finally:
        sampler.close()


def logits(backend: Any) -> Any:
    return backend.logits(-1).astype(np.float64)


HOT = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)


def test_one_seed_gives_one_answer_and_another_gives_another(backend: Any) -> None:
    assert answer(backend, HOT, 7) == answer(backend, HOT, 7)
    assert answer(backend, HOT, 7) != answer(backend, HOT, 8)


def test_greedy_takes_the_most_likely_whatever_the_seed(backend: Any) -> None:
    cold = SamplingParams(temperature=0.0)
    assert answer(backend, cold, 1) == answer(backend, cold, 2)
    assert backend.decode(batch([TokenRow(9, backend.kv_last(0) + 1, 0, True)]))
    sampler = backend.sampler(cold, 1)
    assert sampler.sample(-1) == int(logits(backend).argmax())
    sampler.close()


def test_top_k_one_is_greedy(backend: Any) -> None:
    assert answer(backend, SamplingParams(temperature=2.0, top_k=1), 5) == answer(
        backend, SamplingParams(temperature=0.0), 5
    )


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (HOT.model_copy(update={"top_k": 3}), lambda p: np.sort(p)[-3]),
        (HOT.model_copy(update={"min_p": 0.1}), lambda p: 0.1 * p.max()),
        (
            HOT.model_copy(update={"top_p": 0.3}),
            lambda p: np.sort(p)[::-1][int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.3))],
        ),
    ],
    ids=["top_k", "min_p", "top_p"],
)
def test_cuts_leave_only_what_they_allow(backend: Any, params: SamplingParams, kept: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    scores = logits(backend)
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    least = kept(chances) * (1 - 1e-4)
    sampler = backend.sampler(params, 3)
    drawn = collections.Counter(sampler.sample(-1) for _ in range(300))
    sampler.close()
    assert len(drawn) > 1
    assert all(chances[token] >= least for token in drawn)


def test_draws_follow_the_distribution(backend: Any) -> None:
    """2,000 draws of the most likely token: within five standard deviations, a false alarm in 10^6."""
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    scores = logits(backend) / 0.5
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    best = int(chances.argmax())
    sampler = backend.sampler(HOT.model_copy(update={"temperature": 0.5}), 11)
    hits = sum(sampler.sample(-1) == best for _ in range(2000))
    sampler.close()
    assert abs(hits - 2000 * chances[best]) < 5 * np.sqrt(2000 * chances[best] * (1 - chances[best])) + 1


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=300), HOT])
def test_few_tokens_are_drawn_from_as_all_are(backend: Any, params: SamplingParams) -> None:
    """The chain sees the most likely tokens alone; llama.cpp's own call gives it the whole vocabulary."""
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    few, all_of_them = backend.sampler(params, 21), backend.sampler(params, 21)
    llama, context = all_of_them._llama, backend.handle.pointer
    drawn = [few.sample(-1) for _ in range(50)]
    assert drawn == [llama.llama_sampler_sample(all_of_them.pointer, context, -1) for _ in range(50)]
    assert len(set(drawn)) > 1
    few.close()
    all_of_them.close()


@pytest.mark.parametrize(("spread", "quick"), [(3.0, True), (9.0, True), (0.01, False)])
def test_the_most_likely_tokens_are_always_among_the_few(spread: float, quick: bool) -> None:
    logits = np.random.default_rng(5).normal(0.0, spread, 50_000).astype(np.float32)
    few = most_likely(logits, 40)
    assert (few is not None) == quick
    if few is not None:
        assert set(few["id"].tolist()) >= set(np.argsort(-logits)[:40].tolist())
        assert np.array_equal(few["logit"], logits[few["id"]])
    logits[20:] = -np.inf  # a constraint permits fewer than top_k
    assert most_likely(logits, 40) is None


def test_a_bias_forces_and_forbids(backend: Any) -> None:
    assert set(answer(backend, HOT.model_copy(update={"logit_bias": {300: 1e6}}), 1, 5)) == {300}
    first = answer(backend, SamplingParams(temperature=0.0), 1, 1)[0]
    forbidden = SamplingParams(temperature=0.0, logit_bias={first: -float("inf")})
    assert first not in answer(backend, forbidden, 1)


@pytest.mark.parametrize("token", [-1, 512, 10**9])
def test_a_bias_on_no_token_is_refused(backend: Any, token: int) -> None:
    with pytest.raises(BadParameter, match="this model's tokens go from 0 to 511"):
        backend.sampler(SamplingParams(logit_bias={token: 1.0}), 1)


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_a_bias_that_is_no_number_is_refused(backend: Any, bias: float) -> None:
    with pytest.raises(BadParameter, match="must be a number"):
        backend.sampler(SamplingParams(logit_bias={5: bias}), 1)


def test_ignoring_the_end_never_ends(backend: Any) -> None:
    end = min(backend.eog_tokens)
    pushed = {end: 50.0}
    assert answer(backend, SamplingParams(temperature=0.0, logit_bias=pushed), 1) == [end]
    endless = answer(backend, SamplingParams(temperature=0.0, ignore_eos=True), 1)
    assert len(endless) == 24
    assert not backend.eog_tokens & set(endless)


def test_penalties_look_back_over_what_was_drawn(backend: Any) -> None:
    plain = answer(backend, SamplingParams(temperature=0.0, ignore_eos=True, logit_bias={300: 1e3}), 1, 12)
    assert plain == [300] * 12
    strong = SamplingParams(temperature=0.0, ignore_eos=True, repeat_penalty=10.0, presence_penalty=2.0)
    assert len(set(answer(backend, strong, 1, 12))) > len(set(answer(backend, SamplingParams(temperature=0.0), 1, 12)))


def test_log_probabilities_are_numpys(backend: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True), TokenRow(10, 1, 0), TokenRow(11, 2, 0, True)]))
    for row in (0, 2, -1):
        scores = backend.logits(row).astype(np.float64)
        expected = scores - (np.log(np.exp(scores - scores.max()).sum()) + scores.max())
        got = backend.logprobs(row, 42, 5)
        assert got.logprob == pytest.approx(expected[42], abs=1e-7), "logits have 24 bits"
        order = np.argsort(-scores, kind="stable")[:5]
        assert [token for token, _, _ in got.top] == list(order)
        assert [value for _, _, value in got.top] == pytest.approx(list(expected[order]), abs=1e-7)
        assert got.piece == backend.piece(42)
        assert np.exp(expected).sum() == pytest.approx(1.0)


def test_log_probabilities_do_not_see_the_sampler(backend: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    before = backend.logprobs(-1, 42, 3)
    sampler = backend.sampler(HOT.model_copy(update={"logit_bias": {42: 5.0}}), 1)
    sampler.sample(-1)
    sampler.close()
    assert backend.logprobs(-1, 42, 3) == before
    assert backend.logprobs(-1, 42, 0).top == ()


def test_logits_that_are_no_numbers_raise_instead_of_sorting(backend: Any) -> None:
    assert backend.decode(batch([TokenRow(9, 0, 0, True)]))
    backend.logits(-1)[17] = np.nan
    sampler = backend.sampler(HOT, 1)
    with pytest.raises(DecodeFailed, match="not a number"):
        sampler.sample(-1)
    sampler.close()


def test_pieces_of_control_tokens_are_empty_and_of_bytes_are_bytes(backend: Any) -> None:
    assert [backend.piece(token) for token in backend.eog_tokens] == [b""]
    assert backend.piece(backend.model.tokenize("\x07", special=False)[-1]) == b"\x07"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        backend.piece(512)
