"""Random lives of a whole engine on the fake backend: whatever comes in whatever order, these always hold.

After every step the books agree with each other and with the backend's cells. Every request ends exactly once, nobody
waits for ever, and an answer is the same alone, among others, with remembered prefixes and without.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from engine_driver import Backend, Driver, expected, limits, prompt_of, reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.cache import EmbeddingCache
from opsin.core.answer import Finished
from opsin.core.errors import Cancelled, DecodeFailed, EncodeFailed
from opsin.core.request import Prompt
from opsin.engine import Policy
from opsin.testing import FakeClock


@dataclass(frozen=True)
class Ask:
    """A request, after some steps of the engine."""

    after: int
    parts: tuple[str | int, ...]
    max_tokens: int
    priority: int
    salt: str
    seconds: float | None
    cancel_after: int | None

    @property
    def prompt(self) -> Prompt:
        return prompt_of(*self.parts)


@dataclass(frozen=True)
class World:
    """Sizes of everything; a sequence's context has `spare` cells more than the longest prompt takes."""

    spare: int
    n_ubatch: int
    n_seq_max: int
    parallel: int
    slice: int
    turn: float
    wait_for: int
    swap_cells: int
    image_bytes: int
    layers: int
    image_tokens: int
    mixed_rows: int
    asynchronous: bool
    draft_beside: int
    park_beside: int | None
    inside: bool  # whether requests come in the midst of an encode, too


span = st.sampled_from(["a", "b", "ab", "abba" * 2, "ab" * 8])
parts = st.lists(st.one_of(st.integers(0, 1), span), max_size=4).map(tuple)
asks = st.builds(
    Ask,
    after=st.sampled_from([0, 0, 0, 1, 2, 5, 15]),
    parts=parts,
    max_tokens=st.sampled_from([40, 12, 3, 1]),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    salt=st.sampled_from(["", "", "", "other"]),
    seconds=st.sampled_from([*[None] * 12, 0.0, 0.05, 0.2]),
    cancel_after=st.sampled_from([*[None] * 12, 0, 1, 4, 12]),
)
worlds = st.builds(
    World,
    spare=st.sampled_from([1, 6, 20, 40, 200]),
    n_ubatch=st.sampled_from([16, 5, 2, 1]),
    n_seq_max=st.sampled_from([6, 4, 3, 2, 1]),
    parallel=st.sampled_from([5, 4, 3, 2, 1]),
    slice=st.sampled_from([1, 4, 64]),
    turn=st.sampled_from([0.0, 0.01, 0.06]),
    wait_for=st.sampled_from([1, 4, 32]),
    swap_cells=st.sampled_from([0, 0, 12, 60, 1000]),
    image_bytes=st.sampled_from([0, 64, 2**20]),
    layers=st.sampled_from([1, 3]),
    image_tokens=st.sampled_from([1, 4, 12]),
    mixed_rows=st.sampled_from([0, 3, 16]),
    asynchronous=st.booleans(),
    draft_beside=st.sampled_from([0, 1, 4]),
    park_beside=st.sampled_from([None, 1, 4, 32]),
    inside=st.booleans(),
)
faults = st.dictionaries(st.integers(0, 40), st.sampled_from(["encode", "decode", "room"]), max_size=3)


def context_of(world: World, history: list[Ask]) -> int:
    longest = max(
        sum(world.image_tokens if isinstance(part, int) else len(part) for part in ask.parts) for ask in history
    )
    return longest + 2 + world.spare  # a begin token and the mark of the turn


def live(world: World, history: list[Ask], mishaps: dict[int, str], *, keep_prefixes: bool) -> Driver:
    size = limits(context_of(world, history), world.n_ubatch, world.n_seq_max)
    size = dataclasses.replace(size, mixed_rows=world.mixed_rows, asynchronous=world.asynchronous)
    backend = Backend(reply, limits=size, clock=FakeClock(), image_tokens=world.image_tokens)
    backend.layers = world.layers
    policy = Policy(
        parallel=world.parallel,
        slice=world.slice,
        shortest_wait=world.turn,
        longest_wait=world.turn,
        slice_seconds=world.slice / 1000,
        wait_for=world.wait_for,
        swap_cells=world.swap_cells,
        draft_beside=world.draft_beside,
        park_beside=world.park_beside,
        keep_prefixes=keep_prefixes,
    )
    driver = Driver(size, policy, backend, EmbeddingCache(world.image_bytes))
    cancels: dict[int, list[int]] = {}
    coming = list(enumerate(history))
    due = coming[0][1].after if coming else 0

    def arrive() -> None:
        number, ask = coming.pop(0)
        driver.ask(ask.prompt, max_tokens=ask.max_tokens, priority=ask.priority, salt=ask.salt, seconds=ask.seconds)
        if ask.cancel_after is not None:
            cancels.setdefault(driver.steps + ask.cancel_after, []).append(number)

    backend.arriving = lambda: arrive() if coming and world.inside else None
    while coming or any(not asked.stream.done for asked in driver.asked):
        while coming and driver.steps >= due:
            arrive()
            due = driver.steps + coming[0][1].after if coming else 0
        for number in cancels.pop(driver.steps, ()):
            if not driver.asked[number].stream.done:
                driver.asked[number].stream.cancel()
        mishap = mishaps.get(driver.steps)
        if mishap == "encode":
            backend.fail_encode = RuntimeError("boom")
        elif mishap == "decode":
            backend.fail_decode = RuntimeError("boom")
        elif mishap == "room":
            backend.out_of_room = 1
        driver.step()
        assert driver.steps < 4000, "somebody starves"
    backend.fail_encode = backend.fail_decode = None
    driver.step()
    driver.close()
    return driver


def check_answers(world: World, history: list[Ask], mishaps: dict[int, str], driver: Driver) -> None:
    for ask, asked in zip(history, driver.asked, strict=True):
        (end,) = asked.ends
        whole = expected(ask.prompt, ask.max_tokens, context_of(world, history), world.image_tokens)
        if isinstance(end, Finished):
            answer = end.answer
            assert answer.text == asked.text
            if answer.limit == "seconds":
                assert ask.seconds is not None
                assert whole.startswith(answer.text)
            else:
                assert answer.text == whole
            assert sum(image.cached for image in answer.images) <= len(answer.images)
            assert answer.usage.cached_tokens < answer.usage.prompt_tokens
        else:
            assert whole.startswith(asked.text)
            if isinstance(end, Cancelled):
                assert ask.cancel_after is not None
            else:
                assert isinstance(end, (EncodeFailed, DecodeFailed))
                assert mishaps
    snapshot = driver.loop.snapshot()
    assert snapshot.encodes == len(driver.backend.encoded)


def any_life(world: World, history: list[Ask], mishaps: dict[int, str]) -> None:
    for keep_prefixes in (True, False):
        driver = live(world, history, mishaps, keep_prefixes=keep_prefixes)
        check_answers(world, history, mishaps, driver)


profile = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@settings(profile, max_examples=110, derandomize=True)
@given(worlds, st.lists(asks, min_size=1, max_size=6), st.one_of(st.just({}), faults))
def test_any_life(world: World, history: list[Ask], mishaps: dict[int, str]) -> None:
    any_life(world, history, mishaps)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(profile, max_examples=1500)
@given(worlds, st.lists(asks, min_size=1, max_size=12), st.one_of(st.just({}), faults))
def test_many_longer_lives(world: World, history: list[Ask], mishaps: dict[int, str]) -> None:
    any_life(world, history, mishaps)
