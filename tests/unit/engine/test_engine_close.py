"""The end of an engine reaches everybody: those whose prompt nobody had begun to lay out, and late callers too."""

import queue
import threading

import pytest

from opsin.cache import EmbeddingCache
from opsin.core.errors import EngineClosed, EngineDied
from opsin.core.request import Prompt, TextPart, TokenizedPrompt
from opsin.engine import AnswerStream, Engine, Policy
from opsin.engine.loop import Loop
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

PROMPT = Prompt((TextPart("what?" + TURN_TEXT),))


class Slow(FakeBackend):
    """Lays a prompt out when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def tokenize(self, *args: object, **named: object) -> TokenizedPrompt:
        self.go.wait(60)
        return super().tokenize(*args, **named)  # type: ignore[arg-type]


def test_closing_tells_those_whose_prompt_no_worker_had_begun_with() -> None:
    """Their work was dropped with the workers' queue, and they waited for ever."""
    backend = Slow()
    engine = Engine(lambda: backend)
    streams = [engine.submit(PROMPT) for _ in range(8)]
    closer = threading.Thread(target=engine.close)
    closer.start()
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    for stream in streams[2:]:
        threading.Thread(target=_read, args=(stream, answers), daemon=True).start()
    for _ in streams[2:]:  # two workers wait for the backend with the first two
        assert isinstance(answers.get(timeout=30), EngineClosed)
    backend.go.set()
    closer.join()
    assert all(stream.done for stream in streams)


def _read(stream: AnswerStream, answers: queue.SimpleQueue[object]) -> None:
    try:
        answers.put(stream.result())
    except EngineClosed as error:
        answers.put(error)


def test_closing_waits_until_images_are_on_disk() -> None:
    closed: list[str] = []

    class Store:
        def get(self, identity: str) -> None:
            return None

        def put(self, identity: str, embedding: object) -> None: ...

        def close(self) -> None:
            closed.append("store")

    with Engine(FakeBackend, images=EmbeddingCache(100, Store())):
        assert not closed
    assert closed


def test_work_that_was_handed_over_before_a_death_is_not_done_after_it() -> None:
    """A backend that just died must not be called again by whoever is still in the inbox."""
    in_step, die = threading.Event(), threading.Event()

    class Dying(FakeBackend):
        def synchronize(self) -> None:
            in_step.set()
            die.wait(60)
            raise MemoryError("out of it")

        def close(self) -> None:
            self.closed = True

    ran: list[str] = []
    engine = Engine(Dying)
    stream = engine.submit(PROMPT)
    assert in_step.wait(60)
    late = engine._loop.call(lambda _: ran.append("late"))
    die.set()
    with pytest.raises(EngineDied):
        late.result(60)
    with pytest.raises(EngineDied):
        stream.result()
    assert not ran
    engine.close()


def test_a_loop_that_was_never_opened_closes() -> None:
    Loop(FakeBackend, Policy(), EmbeddingCache(0), lambda _: None).close()
