"""The model's life on the fake backend: not before it is warm, not after the drain began, back after an idle unload."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from opsin.core.answer import Answer
from opsin.core.errors import EngineClosed, EngineDied, ModelNotFound
from opsin.core.sampling import SamplingParams
from opsin.core.server_settings import ServerSettings
from opsin.engine import AnswerStream, Engine
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.server.life import Life, NotReady, PictureBlocked, exit_code_of
from opsin.server.model import LoadedModel
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + TURN_TEXT
LIMIT = 20.0


class Opener:
    """Opens models on fake backends, once `gate` is open."""

    def __init__(self, reply: Callable[[str], str] = lambda _: "a red circle.") -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reply = reply
        self.backends: list[FakeBackend] = []
        self.error: Exception | None = None

    def __call__(self) -> LoadedModel:
        assert self.gate.wait(LIMIT)
        if self.error is not None:
            raise self.error
        self.backends.append(FakeBackend(self.reply))
        engine = Engine(lambda: self.backends[-1])
        source = TemplateSource(TEMPLATE, "llama", "fake", None, "", "", frozenset({TURN_TEXT}))
        return LoadedModel(engine, PromptBuilder(source), "fake", is_demo=False, close=engine.close)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT))


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - what is awaited is no event; `run` bounds it
        await asyncio.sleep(0.005)


async def ask(life: Life, **params: Any) -> AnswerStream:
    model = await life.model()
    prompt = model.prompts.build([Message("user", "what is this?")])
    return model.engine.submit(prompt, SamplingParams(**params), load_ms=model.load_ms)


async def answered(life: Life) -> Answer:
    with life.entered():
        return await (await ask(life)).answer()


def test_ready_is_said_after_the_warm_up_and_not_before() -> None:
    async def work() -> None:
        opener = Opener()
        opener.gate.clear()
        life = Life(ServerSettings(), opener)
        starting = asyncio.create_task(life.start())
        await asyncio.sleep(0)
        assert (life.state, life.ready, life.loaded) == ("loading", False, None)
        with pytest.raises(NotReady) as refused:
            await life.model()
        assert (refused.value.http_status, refused.value.retry_after) == (503, 2)
        opener.gate.set()
        await starting
        assert (life.state, life.ready) == ("ready", True)
        assert life.placement is not None
        assert life.placement.encoder
        assert (await life.model()).engine.stats.finished == 1  # the warm-up's own answer
        assert (await answered(life)).text == "a red circle."
        await life.close()

    run(work())


def test_nothing_of_the_warm_up_is_remembered_for_anybody() -> None:
    async def work() -> None:
        life = Life(ServerSettings(), Opener())
        await life.start()
        model = await life.model()
        assert model.engine.pictures.bytes == 0
        prompt = model.prompts.build([Message("user", "Hello.")])
        assert (await model.engine.submit(prompt).answer()).usage.cached_tokens == 0
        await life.close()

    run(work())


def test_a_model_that_cannot_be_loaded_raises_its_own_error() -> None:
    async def work() -> None:
        opener = Opener()
        opener.error = ModelNotFound("there is no such file")
        life = Life(ServerSettings(), opener)
        with pytest.raises(ModelNotFound) as caught:
            await life.start()
        assert (life.state, life.ready, exit_code_of(caught.value)) == ("failed", False, 3)
        with pytest.raises(NotReady):
            await life.model()

    run(work())


def test_a_drain_lets_nobody_in_and_waits_for_those_inside() -> None:
    async def work() -> None:
        life = Life(ServerSettings(), Opener())
        await life.start()
        with life.entered():
            draining = asyncio.create_task(life.drain(LIMIT))
            await until(lambda: life.state == "draining")
            assert life.ready is False
            with pytest.raises(NotReady), life.entered():
                pass
            assert (await (await ask(life)).answer()).text == "a red circle."  # who is inside still gets the model
            assert not draining.done()
        assert await draining is True
        assert life.loaded is None
        with pytest.raises(NotReady):
            await life.model()

    run(work())


def test_who_takes_longer_than_the_drain_is_told_and_not_left_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.server.life.LAST_WORDS_SECONDS", 0.1)

    async def work() -> None:
        life = Life(ServerSettings(), Opener())
        await life.start()
        ends: list[BaseException] = []

        forever = asyncio.Event()
        asking = asyncio.create_task(hanging(life, forever, ends))
        await until(lambda: life.running == 1)
        assert await life.drain(0.05) is False
        assert life.loaded is None
        forever.set()
        await asking
        assert [type(end) for end in ends] == [EngineClosed]

    async def hanging(life: Life, forever: asyncio.Event, ends: list[BaseException]) -> None:
        with life.entered():
            model = await life.model()
            await forever.wait()
            try:
                model.engine.submit(model.prompts.build([Message("user", "and now?")]))
            except EngineClosed as error:
                ends.append(error)

    run(work())


def test_an_idle_model_is_unloaded_and_the_next_request_waits_for_it_and_says_how_long() -> None:
    async def work() -> None:
        opener = Opener()
        life = Life(ServerSettings(idle_unload_seconds=0.05), opener)
        await life.start()
        watching = asyncio.create_task(life.watch())
        with life.entered():
            await asyncio.sleep(0.2)
            assert life.state == "ready"  # in use, however long
        await until(lambda: life.state == "unloaded" and opener.backends[0].closed)
        assert (life.ready, life.loaded) == (True, None)
        opener.gate.clear()
        asking = [asyncio.create_task(answered(life)) for _ in range(3)]
        await asyncio.sleep(0.05)
        opener.gate.set()
        answers = await asyncio.gather(*asking)
        assert len(opener.backends) == 2  # loaded once for all three
        assert all(answer.stages.load_ms >= 40 for answer in answers)
        watching.cancel()
        await life.close()

    run(work())


def test_a_model_that_cannot_be_loaded_again_fails_the_request_and_is_tried_again() -> None:
    async def work() -> None:
        opener = Opener()
        life = Life(ServerSettings(idle_unload_seconds=0.01), opener)
        await life.start()
        watching = asyncio.create_task(life.watch())
        await until(lambda: life.state == "unloaded")
        watching.cancel()
        opener.error = ModelNotFound("gone")
        with pytest.raises(ModelNotFound):
            await answered(life)
        opener.error = None
        assert (await answered(life)).text == "a red circle."
        assert life.state == "ready"
        await life.close()

    run(work())


def test_the_watch_ends_with_the_engines_death() -> None:
    async def work() -> None:
        opener = Opener()
        life = Life(ServerSettings(), opener)
        await life.start()
        watching = asyncio.create_task(life.watch())

        def broken(_rows: object) -> bool:
            raise ZeroDivisionError

        opener.backends[0].decode = broken  # type: ignore[method-assign,assignment]
        with pytest.raises(EngineDied):
            await answered(life)
        with pytest.raises(EngineDied) as caught:
            await watching
        assert (life.state, exit_code_of(caught.value)) == ("failed", 4)
        await life.close()

    run(work())


class Notes:
    """A ledger that remembers what it is told."""

    def __init__(self, blocked: Iterable[str] = ()) -> None:
        self.blocked = frozenset(blocked)
        self.told: list[tuple[str, list[str]]] = []

    def begin(self, identities: Iterable[str]) -> None:
        self.told.append(("begin", list(identities)))

    def end(self, identities: Iterable[str]) -> None:
        self.told.append(("end", list(identities)))


def test_pictures_in_flight_are_told_once_each_and_blocked_ones_refused() -> None:
    notes = Notes(["bad"])
    life = Life(ServerSettings(), Opener(), ledger=notes)
    flying = life.in_flight(["b", "a", "b"])
    flying.__enter__()
    assert notes.told == [("begin", ["a", "b"])]
    assert not flying.__exit__(KeyError, KeyError(), None)  # however the work ended
    assert notes.told[1:] == [("end", ["a", "b"])]
    with pytest.raises(PictureBlocked) as refused, life.in_flight(["a", "bad"]):
        pass
    assert refused.value.http_status == 422
    assert len(notes.told) == 2


def test_a_drain_during_the_loading_is_no_readiness_afterwards() -> None:
    async def work() -> None:
        opener = Opener()
        opener.gate.clear()
        life = Life(ServerSettings(), opener)
        starting = asyncio.create_task(life.start())
        await asyncio.sleep(0)
        assert await life.drain(1.0) is True
        opener.gate.set()
        await starting
        assert (life.state, life.ready) == ("draining", False)
        await life.close()

    run(work())
