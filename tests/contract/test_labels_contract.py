"""Choices on the fake and on real llama.cpp: as if every label had been asked for alone, one token after another."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opsin.core.backend import BackendLimits
from opsin.core.request import EmbeddingRows, ImageChunk, ImagePart, Prompt, SamplingParams, TextPart, TokenBatch
from opsin.core.settings import EngineSettings
from opsin.engine import Engine, Policy
from opsin.engine.labels import spellings
from opsin.testing import FakeBackend, image

LABELS = ["red", "red square", "a blue circle", "a blue ring", "green", "at the top", "at the top left", "no"]
SHOTS = {"none": (), "one": (1,)}


@pytest.fixture(scope="module", params=["fake", "native"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    def made() -> Any:
        if request.param == "fake":
            return FakeBackend(lambda text: LABELS[len(text) % 8], limits=BackendLimits(512, 64, 8, 259, 4, 512))
        from opsin.native import open_backend
        from synth import write_pair

        pair = write_pair("tiny", Path(tmp_path_factory.mktemp("pair")))
        return open_backend(EngineSettings(model=pair.llm, mmproj=pair.mmproj, ctx=1024, parallel=4, ubatch=64))

    with Engine(made, policy=Policy(parallel=4)) as opened:
        yield opened


def prompt(text: str, shots: tuple[int, ...]) -> Prompt:
    return Prompt((*(ImagePart(image(shot, 40, 30)) for shot in shots), TextPart(f"{text}\x1e")))


def fill(backend: Any, seq_id: int, asked: Prompt) -> tuple[int, int]:
    """Prefill a prompt chunk by chunk; its next position, and the last row."""
    import numpy as np

    tokenized = backend.tokenize(asked.parts, add_bos=True)
    pos = row = 0
    for chunk in tokenized.chunks:
        last = chunk is tokenized.chunks[-1]
        if isinstance(chunk, ImageChunk):
            positions = np.arange(pos, pos + chunk.n_tokens, dtype=np.int32)[np.newaxis, :]
            assert backend.decode(EmbeddingRows(backend.encode(chunk), positions, seq_id, logits=last))
        else:
            batch = TokenBatch()
            batch.append(chunk.tokens, pos, seq_id, logits=last)
            assert backend.decode(batch)
        row, pos = chunk.n_tokens - 1, pos + chunk.n_pos
    tokenized.close()
    return pos, row


def one_at_a_time(backend: Any, asked: Prompt, ways: dict[tuple[int, ...], str]) -> dict[tuple[int, ...], float]:
    """The log probability of each spelling, teacher-forced token by token behind a prompt of its own."""
    found, seq_id = {}, backend.limits.n_seq_max - 1
    for way in ways:
        backend.kv_remove(seq_id, 0, -1)
        pos, row = fill(backend, seq_id, asked)
        total = 0.0
        for token in way:
            total += backend.score(row, [token])[0]
            batch = TokenBatch()
            batch.append([token], pos, seq_id, logits=True)
            assert backend.decode(batch)
            row, pos = 0, pos + 1
        found[way] = total
    backend.kv_remove(seq_id, 0, -1)
    return found


@pytest.mark.parametrize("shots", SHOTS.values(), ids=SHOTS.keys())
def test_labels_scored_together_are_as_likely_as_each_of_them_alone(engine: Engine, shots: tuple[int, ...]) -> None:
    asked = prompt("what is this?", shots)
    streams = [engine.submit(prompt(f"beside {n}", ()), SamplingParams(max_tokens=40, guard=False)) for n in range(2)]
    answer = engine.submit(asked, SamplingParams(choices=LABELS, reasons=False)).result()
    for stream in streams:
        stream.result()
    assert answer.choice is not None

    def alone(backend: Any) -> tuple[dict[tuple[int, ...], str], dict[tuple[int, ...], float]]:
        def tokens(text: str) -> tuple[int, ...]:
            tokenized = backend.tokenize([TextPart(text, special=False)], add_bos=False)
            tokenized.close()
            return tuple(token for chunk in tokenized.chunks for token in chunk.tokens)

        ways = spellings(LABELS, tokens, backend.piece)
        while engine._loop._scheduler.kv.evict_oldest():  # else it would lose cells that it counts
            pass
        engine._loop._apply()
        return ways, one_at_a_time(backend, asked, ways)

    ways, logprobs = engine.call(alone)
    assert any(len(way) > 2 for way in ways)
    likely = dict.fromkeys(LABELS, 0.0)
    for way, label in ways.items():
        longer = [one for one in ways if len(one) > len(way) and one[: len(way)] == way]
        nearest = [one for one in longer if not any(one != two and one[: len(two)] == two for two in longer)]
        likely[label] += math.exp(logprobs[way]) - sum(math.exp(logprobs[one]) for one in nearest)
    total = sum(likely.values())
    for label, value in likely.items():
        # Logits move a little with the order of cells; spellings a hundred times less likely are left out.
        assert answer.choice.probabilities[label] == pytest.approx(value / total, rel=0.03, abs=2e-3), label
    assert answer.choice.label == max(likely, key=lambda label: likely[label])
    assert answer.text == answer.choice.label


def test_a_question_asked_again_finds_its_prompt_and_gives_the_same(engine: Engine) -> None:
    asked = prompt("which one?", (2,))
    first, again = (engine.submit(asked, SamplingParams(choices=LABELS, reasons=False)).result() for _ in range(2))
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert first.probabilities == pytest.approx(again.probabilities, abs=2e-3)
    engine.call(lambda _: engine._loop._self_check())
