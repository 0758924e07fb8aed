"""Where decoding comes back before its work is done, a token is shown while the next one is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from engine_driver import Backend, Driver, limits, prompt_of

from opsin.core.answer import TextDelta
from opsin.core.request import EmbeddingRows, TokenBatch
from opsin.engine import Policy
from opsin.testing import FakeClock


class Recorder(Backend):
    """Notes when work begins and when it is waited for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.said: list[str] = []

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        self.said.append("decode")
        return super().decode(rows, may_stop=may_stop)

    def synchronize(self) -> None:
        self.said.append("wait")
        super().synchronize()


def driver(text: str, *, asynchronous: bool = True) -> Driver:
    size = dataclasses.replace(limits(), asynchronous=asynchronous)
    backend = Recorder(lambda _: text, limits=size, clock=FakeClock())
    return Driver(size, Policy(parallel=4), backend)


def test_a_token_is_shown_between_the_start_of_the_next_and_the_wait_for_it() -> None:
    made = driver("abcdef")
    asked = made.ask(prompt_of("hello"), max_tokens=5)
    backend, add = made.backend, asked.stream.add
    assert isinstance(backend, Recorder)

    def noted(event: object) -> None:
        if isinstance(event, TextDelta):
            backend.said.append(event.text)
        add(event)  # type: ignore[arg-type]

    asked.stream.add = noted  # type: ignore[method-assign]
    made.run()
    shown = backend.said[backend.said.index("a") :]
    # The first comes at once, and the last as soon as it is known to be the last.
    assert shown == ["a", "decode", "wait", "decode", "b", "wait", "decode", "c", "wait", "decode", "d", "wait", "e"]
    assert asked.answer.text == "abcde"


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 9},
        {"stop": ("de",)},
        {"stop": ("zz",), "max_tokens": 7},
        {"logprobs": 2, "max_tokens": 6},
        {"guard": True, "max_tokens": 40},
        {"max_tokens": 1},
        {"max_tokens": 2},
    ],
)
@pytest.mark.parametrize("text", ["abcdefghij", "ab" * 40, "é€𝄞" * 4])
def test_answers_are_what_they_are_without(text: str, params: dict[str, Any]) -> None:
    answers = []
    for asynchronous in (False, True):
        made = driver(text, asynchronous=asynchronous)
        asked = made.ask(prompt_of("hello"), **{"max_tokens": 30, "guard": False, **params})
        other = made.ask(prompt_of("another"), max_tokens=12)
        made.run()
        answer = asked.answer
        assert answer.text == asked.text
        told = (answer.text, answer.tokens, answer.finish_reason, answer.limit, answer.guard, answer.logprobs)
        answers.append((told, other.answer.tokens))
    assert answers[0] == answers[1]


def test_the_prefix_of_an_answer_that_ended_late_is_whole() -> None:
    """The token behind the stop string is in the KV cache: the next question finds what is there."""
    made = driver("abcdef")
    first = made.ask(prompt_of("hello"), stop=("cd",), max_tokens=20)
    made.run()
    assert first.answer.text == "ab"
    second = made.ask(prompt_of("hello"), max_tokens=4)
    made.run()
    assert second.answer.usage.cached_tokens > 0
    assert second.answer.text == "abcd"


def test_readers_are_woken_before_an_image_is_encoded() -> None:
    """An encode may take long, and where a GPU does it nobody gets a turn meanwhile."""
    made = driver("abcdefgh")
    made.loop._policy = dataclasses.replace(made.policy, decode_in_encode=False)
    backend, waiting = made.backend, list[int]()
    encode = backend.encode

    def noted(*args: Any) -> Any:
        waiting.append(len(made.loop._touched))
        return encode(*args)

    backend.encode = noted  # type: ignore[method-assign]
    asked = made.ask("talk", max_tokens=8)
    for _ in range(3):
        made.step()
    shown = asked.text
    made.ask(prompt_of(1), max_tokens=1)
    while not waiting:
        made.step()
    assert len(asked.text) > len(shown)
    assert waiting == [0]
    made.run()


def test_an_answer_that_is_complete_does_not_fail_with_the_step_behind_it() -> None:
    made = driver("abcdef")
    asked = made.ask("hello", stop=("cd",))
    while asked.sequence.output.tokens[-1:] != [ord("d")]:
        made.step()
    assert not asked.ends
    made.backend.fail_decode = RuntimeError("boom")
    made.run()
    assert (asked.answer.text, asked.answer.finish_reason) == ("ab", "stop")
