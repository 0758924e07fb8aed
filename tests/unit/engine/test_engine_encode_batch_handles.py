"""Images encoded beside another's need the tokenized prompts they came from."""

import dataclasses

from engine_driver import Backend, Driver, limits, prompt_of, reply

from opsin.cache import EmbeddingCache
from opsin.core.errors import BadParameter, EncodeFailed
from opsin.core.request import ImageChunk
from opsin.engine import Policy
from opsin.testing import FakeClock


class Strict(Backend):
    """Its chunks are alive as long as their tokenized prompts, as mtmd's are."""

    def tokenize(self, parts, **options):  # type: ignore[no-untyped-def]
        made = super().tokenize(parts, **options)
        made.chunks = tuple(
            dataclasses.replace(run, handle=made.owned) if isinstance(run, ImageChunk) else run for run in made.chunks
        )
        return made

    def encode(self, run, between=None):  # type: ignore[no-untyped-def]
        if run.handle.closed:
            raise EncodeFailed("The tokenized prompt of this image was closed before it was encoded.")
        return super().encode(run, between)

    def sampler(self, params, seed, compiled=None):  # type: ignore[no-untyped-def]
        if params.ignore_eos:
            raise BadParameter("ignore_eos cannot be used here.")
        return super().sampler(params, seed, compiled)


def driver(images: EmbeddingCache | None = None) -> Driver:
    size = dataclasses.replace(limits(n_ctx=2000), encode_batch=4)
    backend = Strict(reply, limits=size, clock=FakeClock())
    return Driver(size, Policy(parallel=4), backend, images or EmbeddingCache(2**20))


def test_a_request_that_ends_before_the_batch_takes_nobody_with_it() -> None:
    made = driver()
    fine = made.ask(prompt_of(1))
    made.step()  # its text
    bad = made.ask(prompt_of(2), ignore_eos=True)  # admitted and refused between the plan of the batch and its encode
    made.run()
    assert isinstance(bad.ends[0], BadParameter)
    assert fine.answer.finish_reason
    made.close()


def test_an_embedding_that_was_evicted_meanwhile_is_still_the_requests_own() -> None:
    made = driver()
    first = made.ask(prompt_of(1), max_tokens=1)
    made.run()
    assert first.answer.finish_reason
    again = made.ask(prompt_of("x", 1, 2))  # the first image is known, so only the second has pixels
    made.images._held.clear()  # evicted meanwhile
    made.run()
    assert again.answer.finish_reason
    made.close()


def test_every_image_of_a_batch_is_counted() -> None:
    made = driver()
    for number in range(3):
        made.ask(prompt_of(number))
    made.run()
    assert made.loop.snapshot().encodes == len(made.backend.encoded) == 3
    made.close()
