"""Tokens chosen on the device: those that the host chooses from the same logits, and by operations of the device."""

from collections.abc import Callable
from typing import Any

import pytest

from opsin.core.request import SamplingParams, TokenBatch

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, ignore_eos=True)
BIASED = DRAWN.model_copy(update={"repeat_penalty": 1.3})


@pytest.mark.parametrize("kinds", [[GREEDY] * 4, [DRAWN] * 4, [GREEDY, DRAWN, BIASED, GREEDY]], ids=str)
def test_device_and_host_choose_the_same(opened: Callable[..., Any], pair: Any, kinds: list[SamplingParams]) -> None:
    said = []
    for device_sampling in (False, True):
        backend = opened(pair, parallel=4, flash_attention=False, device_sampling=device_sampling)
        samplers = [backend.sampler(kind, seed) for seed, kind in enumerate(kinds)]
        last, tokens = [5, 6, 7, 8], []
        for pos in range(60):
            assert backend.decode(TokenBatch(last, [pos] * 4, list(range(4)), list(range(4))))
            last = [token for token, _ in backend.sample([(one, row, None) for row, one in enumerate(samplers)])]
            tokens.append(last)
        for one in samplers:
            one.close()
        said.append(tokens)
        backend.close()
    assert said[0] == said[1]


def test_the_device_itself_looks_for_the_most_likely_token(prove: Callable[..., Any], pair: Any) -> None:
    found = prove("device_sampling", pair, device_sampling=True)
    assert found.language_model["Vulkan0"].ops["ARGMAX"] == 1
    assert set(found.language_model["CPU"].ops) == {"GET_ROWS"}
