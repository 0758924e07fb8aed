"""A whole engine on real llama.cpp: what goes wrong inside an encode stays there, and what was seen is known later."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from native_help import assert_undisturbed, draw

from opsin.cache import DiskStore, EmbeddingCache
from opsin.core.answer import TextDelta
from opsin.core.errors import Cancelled, EncodeFailed
from opsin.core.request import ImagePart, Prompt, SamplingParams, TextPart
from opsin.engine import Engine, Policy
from opsin.models import Pair
from synth import write_pair

TALK = Prompt((TextPart("USER: tell me a story ASSISTANT:"),))
COLD = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, guard=False, logprobs=20)
SHORT = COLD.model_copy(update={"max_tokens": 4})


def about(seed: int) -> Prompt:
    return Prompt((TextPart("USER: "), ImagePart(draw(seed)), TextPart(" what is it? ASSISTANT:")))


class Faulty:
    """A backend whose next encode is disturbed after some of its nodes."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.disturb: Callable[[], None] | None = None
        self.after = 0
        self.nodes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, run: Any, between: Callable[[], None] | None = None) -> Any:
        disturb, self.disturb = self.disturb, None
        self.nodes = 0

        def node() -> None:
            self.nodes += 1
            if disturb is not None and self.nodes == self.after:
                disturb()
            if between is not None:
                between()

        return self._backend.encode(run, node)


@pytest.fixture(scope="module")
def exact_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("exact"), quantisation="f16")


@pytest.fixture
def rig(open_pair: Callable[..., Any], exact_pair: Pair, tmp_path: Path) -> Any:
    made: list[Faulty] = []

    def opened() -> Faulty:
        made.append(Faulty(open_pair(model=exact_pair.llm, mmproj=exact_pair.mmproj)))
        return made[0]

    images = EmbeddingCache(2**24, DiskStore(tmp_path))
    with Engine(opened, policy=Policy(parallel=4, shortest_wait=0.0, longest_wait=0.0), images=images) as engine:
        yield engine, made[0], images


def kept(folder: Path, count: int) -> int:
    """How many images are on disk, once there are `count`: they are written one after another, behind the answers."""
    end = time.monotonic() + 20
    while (found := len(list(folder.rglob("*.npz")))) < count and time.monotonic() < end:
        time.sleep(0.01)
    return found


def streaming(engine: Engine) -> tuple[Any, Any]:
    """An answer that has begun, and what is left to read of it."""
    stream = engine.submit(TALK, COLD)
    events = iter(stream)
    while not isinstance(next(events), TextDelta):
        pass
    return stream, events


@pytest.mark.parametrize("seed", range(8))
def test_an_error_at_a_random_node_of_an_encode_is_not_remembered_and_disturbs_nobody(
    rig: Any, tmp_path: Path, seed: int
) -> None:
    engine, backend, images = rig
    alone = engine.submit(TALK, COLD).result()
    right = engine.submit(about(0), SHORT).result()
    count = backend.nodes
    assert count >= 2

    def fail() -> None:
        raise EncodeFailed("node broke")

    held = images.bytes
    backend.after = random.Random(seed).randint(1, count)
    backend.disturb = fail
    stream, events = streaming(engine)
    with pytest.raises(EncodeFailed, match="node broke"):
        engine.submit(about(1), SHORT).result()
    *_, end = events
    assert_undisturbed(end.answer, alone)
    assert images.bytes == held
    engine.submit(about(2), SHORT).result()
    assert kept(tmp_path, 2) == 2, "the images before and after it"
    again = engine.submit(about(1), SHORT).result()
    assert again.images[0].cached is False
    assert again.stages.encode_ms > 0
    assert_undisturbed(engine.submit(about(0), SHORT).result(), right)
    assert stream.done


@pytest.mark.parametrize("seed", range(4))
def test_an_encode_whose_asker_goes_away_is_finished_and_remembered_and_disturbs_nobody(
    rig: Any, tmp_path: Path, seed: int
) -> None:
    engine, backend, images = rig
    alone = engine.submit(TALK, COLD).result()
    engine.submit(about(0), SHORT).result()
    held = images.bytes
    asked: list[Any] = []
    backend.after = random.Random(seed).randint(1, backend.nodes)

    submitted = threading.Event()

    def cancel() -> None:
        assert submitted.wait(20)
        asked[0].cancel()

    backend.disturb = cancel
    _, events = streaming(engine)
    asked.append(engine.submit(about(1), SHORT))
    submitted.set()
    with pytest.raises(Cancelled):
        asked[0].result()
    *_, end = events
    assert_undisturbed(end.answer, alone)
    engine.submit(about(2), SHORT).result()
    assert images.bytes == 3 * held, "the image before, the one left, and the one after"
    assert kept(tmp_path, 3) == 3
    assert engine.submit(about(1), SHORT).result().stages.encode_ms == 0


def test_an_image_seen_before_a_restart_is_not_encoded_after_it(open_pair: Callable[..., Any], tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        images = EmbeddingCache(2**24, DiskStore(tmp_path))
        with Engine(open_pair, policy=Policy(parallel=4), images=images) as engine:
            answers.append(engine.submit(about(5), SHORT).result())
    first, second = answers
    assert first.stages.encode_ms > 0
    assert second.stages.encode_ms == 0
    assert [answer.images[0].cached for answer in answers] == [False, True]
    assert first.tokens == second.tokens
