"""Who went away before a worker began with his prompt costs nothing any more."""

import threading

import pytest

from opsin.core.errors import Cancelled
from opsin.core.request import ImagePart, Prompt, TextPart
from opsin.engine import Engine, Policy
from opsin.testing import FakeBackend, image
from opsin.testing.fake_backend import TURN_TEXT


class Held(FakeBackend):
    """Lays out when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.laid_out = 0

    def tokenize(self, parts, **options):  # type: ignore[no-untyped-def]
        self.go.wait(5)
        self.laid_out += 1
        return super().tokenize(parts, **options)


def prompt(number: int) -> Prompt:
    return Prompt((ImagePart(image(number)), TextPart(f"what?{TURN_TEXT}")))


def test_a_cancelled_prompt_is_not_laid_out() -> None:
    backend = Held()
    with Engine(lambda: backend, policy=Policy(parallel=2), now=backend.clock) as engine:
        busy = [engine.submit(prompt(i)) for i in range(2)]  # both workers
        gone = [engine.submit(prompt(i)) for i in range(2, 8)]
        for stream in gone:
            stream.cancel()
        backend.go.set()
        for stream in busy:
            assert stream.result().finish_reason
        for stream in gone:
            with pytest.raises(Cancelled):
                stream.result()
    assert backend.laid_out == 2
