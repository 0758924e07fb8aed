"""llama.cpp's backend sampling, on the CPU's backend: the same answers, and no look through the vocabulary."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from token_rows import TokenRow, batch

from opsin.core.errors import DecodeFailed
from opsin.core.request import Prompt, SamplingParams, TextPart
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.native import open_backend
from opsin.native.device_sampling import MOST, DeviceSampling
from synth import write_pair

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, guard=False)
DRAWN = GREEDY.model_copy(update={"temperature": 1.0})
OTHERS = (
    GREEDY.model_copy(update={"logprobs": 3}),
    GREEDY.model_copy(update={"ignore_eos": False, "json_schema": '{"type": "array", "items": {"type": "integer"}}'}),
    DRAWN.model_copy(update={"repeat_penalty": 1.3}),
    DRAWN.model_copy(update={"top_k": 0}),
    DRAWN.model_copy(update={"top_k": MOST}),
    DRAWN.model_copy(update={"logit_bias": {40: 2.0}}),
    GREEDY.model_copy(update={"ignore_eos": False, "min_tokens": 12}),
    GREEDY.model_copy(update={"choices": ("yes", "no"), "reasons": False}),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_pair("tiny", Path(tmp_path_factory.mktemp("pair")))


def opened(pair: Any, *, device_sampling: bool) -> Engine:
    settings = EngineSettings(
        model=pair.llm, mmproj=pair.mmproj, ctx=4096, parallel=4, threads=1, device_sampling=device_sampling
    )
    return Engine(lambda: open_backend(settings), policy=Policy(parallel=4))


@pytest.fixture(scope="module")
def engines(pair: Any) -> Iterator[tuple[Engine, Engine]]:
    with opened(pair, device_sampling=False) as host, opened(pair, device_sampling=True) as device:
        yield host, device


def answers(engine: Engine, kinds: list[SamplingParams]) -> list[tuple[str, Any]]:
    done = []
    for seed, kind in enumerate(kinds):  # one after another, so that batches are the same in every run
        stream = engine.submit(Prompt((TextPart(f"Question {seed}:"),)), kind.model_copy(update={"seed": seed}))
        done.append(stream.result())
    return [(one.text, [(token.token, token.top) for token in one.logprobs]) for one in done]


@pytest.mark.parametrize("kind", [GREEDY, DRAWN, *OTHERS], ids=range(2 + len(OTHERS)))
def test_every_kind_of_sampling_gives_what_the_host_gives(engines: tuple[Engine, Engine], kind: SamplingParams) -> None:
    host, device = engines
    wanted = answers(host, [kind] * 6)
    assert answers(device, [kind] * 6) == wanted
    assert any(text for text, _ in wanted)


def test_kinds_beside_each_other_do_not_touch(pair: Any) -> None:
    """Four sequences in lockstep, so that both decode the same batches."""
    kinds = [DRAWN, GREEDY, DRAWN.model_copy(update={"repeat_penalty": 1.3}), DRAWN.model_copy(update={"top_k": 0})]

    def lockstep(*, device_sampling: bool) -> list[list[int]]:
        backend = open_backend(
            EngineSettings(model=pair.llm, ctx=1024, parallel=4, threads=1, device_sampling=device_sampling)
        )
        last, said, mode = [5, 6, 7, 8], list[list[int]](), set[bool]()
        samplers = [backend.sampler(kinds[at % 2], at) for at in range(4)]
        for pos in range(90):
            if pos in (40, 50):  # two come who need all logits, and leave again
                for at in (2, 3):
                    samplers[at].close()
                    samplers[at] = backend.sampler(kinds[at if pos == 40 else 0], at)
            assert backend.decode(batch([TokenRow(token, pos, at, True) for at, token in enumerate(last)]))
            last = [token for token, _ in backend.sample([(one, at, None) for at, one in enumerate(samplers)])]
            said.append(last)
            mode.add(device_sampling and backend._device.draws)
        assert len(mode) == 1 + device_sampling
        for one in samplers:
            one.close()
        backend.close()
        return said

    assert lockstep(device_sampling=True) == lockstep(device_sampling=False)


def test_who_draws_reads_few_tokens_and_who_is_greedy_reads_one(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, device = engines
    sampling = device.call(lambda backend: backend)._device
    answers(device, [DRAWN])
    assert sampling.draws
    looked = []
    logits = sampling.logits
    monkeypatch.setattr(sampling, "logits", lambda row: looked.append(row) or logits(row))
    answers(device, [DRAWN, GREEDY, GREEDY])
    assert not sampling.draws
    answers(device, [GREEDY])
    assert not looked
    answers(device, [OTHERS[0]])
    assert len(looked) == OTHERS[0].max_tokens


def test_logits_that_were_not_copied_are_an_error(pair: Any) -> None:
    settings = EngineSettings(model=pair.llm, ctx=512, threads=1, device_sampling=True)
    backend = open_backend(settings)
    try:
        sampler = backend.sampler(DRAWN, 1)
        for pos in range(40):
            assert backend.decode(batch([TokenRow(9, pos, 0, True)]))
        ((token, _),) = backend.sample([(sampler, 0, None)])
        assert 0 <= token < backend.limits.n_vocab
        with pytest.raises(DecodeFailed, match="64 most likely tokens only"):
            backend.logits(0)
        sampler.close()
    finally:
        backend.close()


def test_a_device_that_cannot_choose_leaves_it_to_the_host(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an operation is missing: no token, no candidates, all logits."""
    said, attach = [], DeviceSampling._attach

    def without_top_k(self: DeviceSampling) -> None:
        draws, self.draws = self.draws, False
        attach(self)
        self.draws = draws

    monkeypatch.setattr(DeviceSampling, "_attach", without_top_k)
    for missing in (False, True):
        backend = open_backend(EngineSettings(model=pair.llm, ctx=512, threads=1, device_sampling=missing))
        if missing:
            monkeypatch.setattr(backend._llama, "llama_get_sampled_token_ith", lambda *_: -1)
        tokens = []
        for kind in (GREEDY, DRAWN):
            backend.kv_remove(0, 0, -1)
            sampler, token = backend.sampler(kind, 3), 9
            for pos in range(40):
                assert backend.decode(batch([TokenRow(token, pos, 0, True)]))
                ((token, _),) = backend.sample([(sampler, 0, None)])
                tokens.append(token)
            sampler.close()
        assert not missing or backend._device.draws
        said.append(tokens)
        backend.close()
    assert said[0] == said[1]
