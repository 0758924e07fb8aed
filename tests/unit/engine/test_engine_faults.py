"""Faults that were seen once: what a request asked for is neither forgotten nor done twice, nor in vain."""

import dataclasses
from typing import Any

import pytest
from engine_driver import Backend, Driver, limits, prompt_of

from opsin.core.answer import ReasoningStyle
from opsin.core.errors import BadGrammar
from opsin.core.request import ImageChunk, ImagePart, Prompt, SamplingParams, TextPart, TokenizedPrompt
from opsin.engine import Engine, Policy
from opsin.engine.step import PrefillImage, Tokens
from opsin.testing import FakeBackend, FakeClock, image
from opsin.testing.fake_backend import TURN_TEXT


def about(seed: int, **fields: Any) -> Prompt:
    return Prompt((ImagePart(image(seed)), TextPart("what is this?" + TURN_TEXT)), **fields)


@pytest.mark.parametrize(
    ("opened", "reply", "text"), [(True, "x" * 20, "x" * 12), (False, "<think>" + "y" * 8 + "blue", "blue")]
)
def test_no_thinking_tokens_is_no_reasoning_whoever_opens_it(opened: bool, reply: str, text: str) -> None:
    """A budget of 0 was ignored where the template opens the block. What closes it takes 8 bytes of the reply."""
    asked = about(1, reasoning=ReasoningStyle(), thinking=opened)
    with Engine(lambda: FakeBackend(lambda _: reply)) as engine:
        answer = engine.submit(asked, SamplingParams(max_thinking_tokens=0, guard=False)).result()
    assert not answer.reasoning
    assert answer.text == text


class Both(Backend):
    """Its images attend both ways, as Gemma's do."""

    def tokenize(self, *args: Any, **options: Any) -> TokenizedPrompt:
        made = super().tokenize(*args, **options)
        chunks = (dataclasses.replace(c, causal=False) if isinstance(c, ImageChunk) else c for c in made.chunks)
        return dataclasses.replace(made, chunks=tuple(chunks))


def test_slices_learn_from_images_that_attend_both_ways_too() -> None:
    size = limits(n_ctx=4000, n_ubatch=128)
    made = Driver(
        size,
        Policy(parallel=2, slice=64, slice_seconds=0.1),
        Both(lambda _: "ab" * 200, limits=size, clock=FakeClock()),
    )
    made.backend.image_tokens, made.backend.image_token_ms = 64, 2.0
    made.ask(prompt_of(1), max_tokens=1)
    made.run()
    made.ask("talk", max_tokens=100)
    made.step()
    made.ask("?" * 300, max_tokens=1)
    made.run()
    steps = [plan.step for plan in made.plans]
    assert [step.stop - step.start for step in steps if isinstance(step, PrefillImage)] == [64]
    rows = [len(step.prefill[0].tokens) for step in steps if isinstance(step, Tokens) and step.decode and step.prefill]
    assert rows[0] == 50, "a row takes 2 ms"


def test_what_is_refused_has_computed_nothing_and_what_is_asked_is_laid_out_once() -> None:
    class Counted(FakeBackend):
        laid_out = decoded = 0

        def tokenize(self, *args: Any, **options: Any) -> TokenizedPrompt:
            self.laid_out += 1
            return super().tokenize(*args, **options)

        def decode(self, rows: Any, *, may_stop: bool = False) -> bool:
            self.decoded += 1
            return super().decode(rows, may_stop=may_stop)

    backend = Counted(lambda _: "fine")
    with Engine(lambda: backend) as engine:
        with pytest.raises(BadGrammar):
            engine.submit(about(1), SamplingParams(grammar="bad")).result()
        assert (backend.encoded, backend.decoded) == ([], 0)
        backend.laid_out = 0
        for seed in (1, 1, 2):
            assert engine.submit(about(seed)).result().text == "fine"
        assert backend.laid_out == 3
        assert len(backend.encoded) == 2
