"""`Opsin(isolated=True)` on the demo model: the same answers from a process of its own, which may crash."""

import os
import signal
from pathlib import Path

import pytest

from opsin import Opsin
from opsin.core.errors import EngineDied, ModelNotFound

pytestmark = [pytest.mark.slow, pytest.mark.native]

SHAPES = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo" / "shapes.png"
QUESTION = "What is in this picture?"


def test_the_answers_are_the_same_and_a_crash_costs_no_more_than_its_requests() -> None:
    with Opsin(config=False, disk_cache=False) as inside, Opsin(config=False, disk_cache=False, isolated=True) as apart:
        wanted = inside.ask(SHAPES, QUESTION, temperature=0).text
        assert apart.ask(SHAPES, QUESTION, temperature=0).text == wanted
        assert (apart.info, apart.is_demo, apart.setup) == (inside.info, inside.is_demo, inside.setup)
        assert apart.placement().encoder.keys() == inside.placement().encoder.keys()
        pid = apart.engine.pid  # type: ignore[attr-defined]
        assert pid not in {None, os.getpid()}
        stream = apart.submit([_message()], temperature=0, max_tokens=400, ignore_eos=True, guard=False)
        next(iter(stream))
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(EngineDied):
            stream.result()
        assert apart.ask(SHAPES, QUESTION, temperature=0).text == wanted
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_model_that_is_not_there_is_told_as_ever() -> None:
    with pytest.raises(ModelNotFound):
        Opsin("no/such/file.gguf", config=False, isolated=True)


def _message() -> object:
    from opsin import Message

    return Message("user", "Tell me a story.")
