"""Families that can encode several images at once do, as long as nobody waits for a token meanwhile."""

import dataclasses

from engine_driver import Backend, Driver, limits, prompt_of, reply

from opsin.cache import EmbeddingCache
from opsin.core.errors import EncodeFailed
from opsin.engine import Policy
from opsin.testing import FakeClock


class Counting(Backend):
    """Notes how many chunks each call of the encoder took."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.calls: list[int] = []

    def encode(self, run, between=None):  # type: ignore[no-untyped-def]
        self.calls.append(1)
        return super().encode(run, between)

    def encode_many(self, runs):  # type: ignore[no-untyped-def]
        before = len(self.calls)
        done = super().encode_many(runs)
        self.calls[before:] = [len(runs)]
        return done


def driver(batch: int = 4, answer=reply, **policy: object) -> Driver:  # type: ignore[no-untyped-def]
    size = dataclasses.replace(limits(n_ctx=2000), encode_batch=batch)
    return Driver(size, Policy(parallel=4, **policy), Counting(answer, limits=size, clock=FakeClock()))  # type: ignore[arg-type]


def calls(made: Driver) -> list[int]:
    assert isinstance(made.backend, Counting)
    return made.backend.calls


def test_images_of_several_requests_and_of_one_are_encoded_at_once() -> None:
    made = driver()
    asked = [made.ask(prompt_of(i)) for i in range(3)] + [made.ask(prompt_of(3, 4, 5))]
    made.run()
    # The last two come while the others answer.
    assert calls(made) == [4, 1, 1]
    assert len(set(made.backend.encoded)) == 6
    assert all(not image.cached for a in asked for image in a.answer.images)
    alone = driver(batch=1)
    again = [alone.ask(prompt_of(i)) for i in range(3)] + [alone.ask(prompt_of(3, 4, 5))]
    alone.run()
    assert calls(alone) == [1] * 6
    assert [a.answer.text for a in asked] == [a.answer.text for a in again]
    made.close()


def test_an_image_is_encoded_once_however_many_have_it() -> None:
    made = driver()
    for text in ("a", "b", "c"):
        made.ask(prompt_of(text, 1, 2))
    made.run()
    assert sorted(made.backend.encoded) == sorted(set(made.backend.encoded))


def test_while_somebody_streams_images_are_encoded_one_by_one() -> None:
    made = driver(answer=lambda text: "x" * 200)
    made.ask("talk", max_tokens=150)
    made.step()
    for i in range(3):
        made.ask(prompt_of(i), max_tokens=1)
    made.run()
    assert calls(made) == [1, 1, 1]


def test_a_failed_batch_fails_who_asked_first_and_is_not_remembered() -> None:
    made = driver()
    asked = [made.ask(prompt_of(i)) for i in range(2)]
    made.backend.fail_encode = RuntimeError("boom")
    made.run()
    assert isinstance(asked[0].ends[0], EncodeFailed)
    assert asked[1].answer.text
    assert len(made.backend.encoded) == 1
    made.close()


def test_without_room_to_remember_them_batched_images_are_still_answered() -> None:
    size = dataclasses.replace(limits(n_ctx=2000), encode_batch=4)
    made = Driver(size, Policy(parallel=4), Counting(reply, limits=size, clock=FakeClock()), EmbeddingCache(0))
    asked = [made.ask(prompt_of(i)) for i in range(3)]
    made.run()
    assert all(a.answer.text is not None for a in asked)
