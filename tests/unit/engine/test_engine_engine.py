"""The engine on the fake backend: one request's way, its ends, its account of time, and its death."""

import asyncio
import dataclasses
import gc
import mmap
import threading
import time
import weakref
from collections.abc import AsyncIterator

import numpy as np
import pytest

from opsin.cache import EmbeddingCache
from opsin.core.answer import Answer, Event, Finished, Progress, ReasoningStyle, TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.errors import (
    BadGrammar,
    Cancelled,
    ContextOverflow,
    DecodeFailed,
    EncodeFailed,
    EngineClosed,
    EngineDied,
    OpsinError,
)
from opsin.core.request import (
    Embedding,
    EmbeddingRows,
    ImageChunk,
    ImagePart,
    Prompt,
    SamplingParams,
    TextPart,
    TokenBatch,
)
from opsin.engine import AnswerStream, Engine, Policy
from opsin.engine.clock import stage_row
from opsin.testing import FakeBackend, FakeClock, image
from opsin.testing.fake_backend import EOS, TURN_TEXT

LIMITS = BackendLimits(n_ctx=512, n_ubatch=64, n_seq_max=8, n_vocab=259, n_embd=4, n_ctx_seq=512)


def prompt(text: str = "what is this?", images: int = 1, **fields: object) -> Prompt:
    parts = (*(ImagePart(image(i)) for i in range(images)), TextPart(f"{text}{TURN_TEXT}"))
    return Prompt(parts, **fields)  # type: ignore[arg-type]


def ask(backend: FakeBackend, question: Prompt | None = None, **params: object) -> Answer:
    with Engine(lambda: backend, now=backend.clock) as engine:
        return engine.submit(question or prompt(), SamplingParams(**params)).result()  # type: ignore[arg-type]


def test_an_answer_is_the_reply_and_everything_is_given_back() -> None:
    backend = FakeBackend(lambda _: "a red circle.")
    answer = ask(backend)
    assert (answer.text, answer.finish_reason, answer.limit) == ("a red circle.", "stop", None)
    assert answer.usage.completion_tokens == len("a red circle.")
    assert answer.usage.image_tokens == 4
    assert answer.usage.prompt_tokens == 1 + 4 + len("what is this?") + 1
    assert answer.images[0].sha256 == image(0).sha256
    assert backend.open_handles == 0
    assert backend.closed


def test_the_reply_depends_on_the_image_and_the_whole_prompt() -> None:
    seen: list[str] = []

    def reply(text: str) -> str:
        seen.append(text)
        return "ok"

    ask(FakeBackend(reply), prompt("how many?", images=2))
    assert seen[-1].count("<") == 8
    assert seen[-1].endswith("how many?" + TURN_TEXT)


def test_a_long_prompt_goes_in_ubatches() -> None:
    text = "x" * 300
    assert ask(FakeBackend(lambda p: str(len(p))), prompt(text, images=0)).text == "301"


def test_a_wide_image_goes_in_ubatches() -> None:
    assert ask(FakeBackend(lambda p: str(p.count("<")), image_tokens=200)).text == "200"


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_tokens_ends_the_answer_and_says_so(limit: int) -> None:
    answer = ask(FakeBackend(lambda _: "abcdefghij"), max_tokens=limit)
    assert answer.text == "abcdefghij"[:limit]
    assert (answer.finish_reason, answer.limit, answer.max_tokens) == ("length", "tokens", limit)


def test_the_profile_limit_holds_when_none_is_asked_for() -> None:
    backend = FakeBackend(lambda _: "abcdefgh" * 30)
    with Engine(lambda: backend, max_tokens=50) as engine:
        answer = engine.submit(prompt(), SamplingParams(guard=False)).result()
    assert answer.usage.completion_tokens == 50


def test_a_full_context_ends_the_answer() -> None:
    backend = FakeBackend(lambda _: "x" * 1000, limits=dataclasses.replace(LIMITS, n_ctx=64, n_ctx_seq=64))
    answer = ask(backend, max_tokens=1000, guard=False)
    assert (answer.finish_reason, answer.limit) == ("length", "context")
    # The last token drawn needs no cell: it is never decoded.
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 65


def test_a_prompt_that_can_never_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(ContextOverflow, match=r"takes 605 tokens, 4 of them for images, and the context holds 512"):
        ask(FakeBackend(), prompt("x" * 599))


def test_max_seconds_keeps_what_is_there() -> None:
    answer = ask(FakeBackend(lambda _: "abcdefghijklmnop"), max_seconds=0.1)
    assert (answer.finish_reason, answer.limit) == ("length", "seconds")
    assert answer.text == "abcdefghijklmnop"[: len(answer.text)]
    assert 0 < len(answer.text) < 16
    assert answer.stages.total_ms < 120


@pytest.mark.slow
def test_the_guard_ends_a_loop_and_off_means_off() -> None:
    def reply(_: str) -> str:
        return "the chair, the table, " * 200

    clock_limits = dataclasses.replace(LIMITS, n_ctx=8192, n_ctx_seq=8192)
    guarded = ask(FakeBackend(reply, limits=clock_limits), max_tokens=3000)
    assert (guarded.finish_reason, guarded.limit) == ("length", "guard")
    assert guarded.guard is not None
    assert guarded.guard.at_token == guarded.usage.completion_tokens < 1500
    assert guarded.text.startswith("the chair, the table, ")
    free = ask(FakeBackend(reply, limits=clock_limits), max_tokens=3000, guard=False)
    assert free.guard is None
    assert free.usage.completion_tokens == 3000


def test_stop_strings_across_tokens_are_cut_out() -> None:
    answer = ask(FakeBackend(lambda _: "a dog\nUSER: and more"), prompt(stop=("USER:",)), stop=("more",))
    assert (answer.text, answer.finish_reason) == ("a dog\n", "stop")


def test_text_streams_in_whole_characters() -> None:
    backend = FakeBackend(lambda _: "größe 🙂 ok")
    with Engine(lambda: backend) as engine:
        events = list(engine.submit(prompt()))
    assert isinstance(events[-1], Finished)
    pieces = [event.text for event in events if isinstance(event, TextDelta)]
    assert "".join(pieces) == "größe 🙂 ok"
    assert "🙂" in pieces


def test_reasoning_is_kept_apart_and_its_budget_holds() -> None:
    backend = FakeBackend(lambda _: "<think>hmm, well</think>blue")
    free = ask(backend, prompt(reasoning=ReasoningStyle()))
    assert (free.reasoning, free.text) == ("hmm, well", "blue")
    inside = ask(
        FakeBackend(lambda _: "x" * 100),
        prompt(reasoning=ReasoningStyle(), thinking=True),
        max_thinking_tokens=5,
        max_tokens=40,
        guard=False,
    )
    assert inside.reasoning is not None
    assert inside.reasoning.startswith("xxxxx")
    assert "<" not in inside.text
    assert inside.text.startswith("xx")


def test_ignore_eos_goes_on_to_the_limit() -> None:
    answer = ask(FakeBackend(lambda _: "ab"), ignore_eos=True, max_tokens=6, guard=False)
    assert (answer.text, answer.usage.completion_tokens) == ("ab....", 6)


def test_logprobs_come_with_each_token() -> None:
    answer = ask(FakeBackend(lambda _: "abc"), logprobs=1)
    assert [entry.piece for entry in answer.logprobs] == [b"a", b"b", b"c"]
    assert answer.logprobs[0].top[0][1] == b"a"


class Asynchronous(FakeBackend):
    """As a GPU: the work of a decode is done when somebody waits for it, or reads its logits."""

    owed = 0.0

    def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
        began = self.clock.seconds
        done = super().decode(rows, may_stop=may_stop)
        self.owed, self.clock.seconds = self.owed + self.clock.seconds - began, began
        return done

    def synchronize(self) -> None:
        self.clock.seconds, self.owed = self.clock.seconds + self.owed, 0.0

    def sample(self, samples):  # type: ignore[no-untyped-def]
        self.synchronize()
        return super().sample(samples)


@pytest.mark.parametrize("kind", [FakeBackend, Asynchronous])
def test_each_stage_has_its_own_time_also_when_decode_returns_early(kind: type[FakeBackend]) -> None:
    """On a GPU decode returns before the work is done: without a synchronize, prefill time would land in sampling."""
    backend = kind(lambda _: "abcd", clock=FakeClock())
    stages = ask(backend).stages
    assert stages.preprocess_ms == pytest.approx(3.0)
    assert stages.encode_ms == pytest.approx(40.0)
    assert stages.image_prefill_ms == pytest.approx(2.0)
    # The begin token alone is no answer's row; the fake bills text by the token.
    assert stages.text_prefill_ms == pytest.approx(0.25 * (1 + len("what is this?") + 1))
    assert stages.decode_ms == pytest.approx(4 * 8.0)
    assert stages.sample_ms == 0.0
    parts = [value for name, value in stage_row(stages).items() if name != "total_ms"]
    assert sum(parts) == pytest.approx(stages.total_ms)


def test_times_before_the_request_are_part_of_its_total() -> None:
    shot = dataclasses.replace(image(0), fetch_ms=11.0, decode_ms=7.0)
    backend = FakeBackend()
    with Engine(lambda: backend, now=backend.clock) as engine:
        question = Prompt((ImagePart(shot), TextPart(TURN_TEXT)))
        stages = engine.submit(question, load_ms=100.0).result().stages
    assert (stages.load_ms, stages.fetch_ms, stages.image_decode_ms) == pytest.approx((100.0, 11.0, 7.0))
    assert stages.total_ms > 118.0


def test_a_failed_encode_is_the_askers_and_nobody_elses() -> None:
    backend = FakeBackend(lambda _: "fine")
    with Engine(lambda: backend) as engine:
        backend.fail_encode = RuntimeError("boom")
        with pytest.raises(EncodeFailed, match="boom"):
            engine.submit(prompt()).result()
        assert engine.submit(prompt()).result().text == "fine"


def test_a_failed_decode_is_told_and_the_engine_lives() -> None:
    backend = FakeBackend(lambda _: "fine")
    with Engine(lambda: backend) as engine:
        backend.fail_decode = RuntimeError("boom")
        with pytest.raises(DecodeFailed, match="boom"):
            engine.submit(prompt()).result()
        assert engine.submit(prompt()).result().text == "fine"


def test_a_bad_grammar_is_refused_and_the_engine_lives() -> None:
    backend = FakeBackend(lambda _: "fine")
    with Engine(lambda: backend) as engine:
        with pytest.raises(BadGrammar):
            engine.submit(prompt(), SamplingParams(grammar="bad")).result()
        assert engine.submit(prompt()).result().text == "fine"


def test_schemas_compile_while_others_are_laid_out_and_stream() -> None:
    """On the engine's thread they would make every stream pause, on the threads that lay out every new prompt wait."""
    compiling, done = threading.Event(), threading.Event()

    class Slow(FakeBackend):
        def check(self, params: SamplingParams) -> None:
            if params.json_schema is not None:
                compiling.set()
                assert done.wait(10)

    with Engine(lambda: Slow(lambda _: "fine")) as engine:
        slow = [engine.submit(prompt(), SamplingParams(json_schema="{}")) for _ in range(6)]
        assert compiling.wait(10)
        assert engine.submit(prompt()).result().text == "fine"
        done.set()
        assert [stream.result().text for stream in slow] == ["fine"] * 6


def test_a_model_that_cannot_be_opened_raises_where_the_engine_is_made() -> None:
    def broken() -> FakeBackend:
        raise FileNotFoundError("nothing here")

    with pytest.raises(FileNotFoundError):
        Engine(broken)


def test_a_dead_engine_tells_everyone_and_refuses_new_work() -> None:
    everyone_asked = threading.Event()

    class Dying(FakeBackend):
        def synchronize(self) -> None:
            everyone_asked.wait()
            raise MemoryError("out of it")

        def close(self) -> None:
            self.closed = True

    backend = Dying()
    engine = Engine(lambda: backend)
    streams = [engine.submit(prompt()) for _ in range(5)]
    everyone_asked.set()
    for stream in streams:
        with pytest.raises(EngineDied, match="out of it"):
            stream.result()
    with pytest.raises(EngineDied):
        engine.submit(prompt()).result()
    assert isinstance(engine.error, EngineDied)
    engine.close()
    assert backend.closed


def test_closing_ends_running_answers_and_refuses_new_ones() -> None:
    backend = FakeBackend(lambda _: "x" * 400, limits=dataclasses.replace(LIMITS, n_ctx=1 << 16, n_ctx_seq=1 << 16))
    engine = Engine(lambda: backend, max_tokens=60_000)
    stream = engine.submit(prompt(), SamplingParams(ignore_eos=True, guard=False))
    assert isinstance(next(iter(stream)), Progress)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed):
        stream.result()
    with pytest.raises(EngineClosed):
        engine.submit(prompt())
    assert backend.open_handles == 0


def test_cancelling_frees_the_sequence_for_the_next() -> None:
    backend = FakeBackend(
        lambda p: "x" * 400 if "long" in p else "short",
        limits=dataclasses.replace(LIMITS, n_ctx=1 << 16, n_ctx_seq=1 << 16),
    )
    with Engine(lambda: backend, max_tokens=60_000) as engine:
        long = engine.submit(prompt("long"), SamplingParams(ignore_eos=True, guard=False))
        assert isinstance(next(iter(long)), Progress)
        long.cancel()
        with pytest.raises(Cancelled):
            long.result()
        assert engine.submit(prompt("quick")).result().text == "short"


def test_the_stream_is_also_asynchronous_and_leaving_it_cancels() -> None:
    backend = FakeBackend(lambda _: "hello", limits=dataclasses.replace(LIMITS, n_ctx=1 << 16, n_ctx_seq=1 << 16))

    async def read(engine: Engine) -> tuple[str, bool]:
        answer = await engine.submit(prompt()).answer()
        endless = engine.submit(prompt(), SamplingParams(ignore_eos=True, guard=False, max_tokens=50_000))
        events = endless.__aiter__()
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()  # type: ignore[attr-defined]
        return answer.text, endless.cancelled

    with Engine(lambda: backend) as engine:
        assert asyncio.run(read(engine)) == ("hello", True)


def streams_alive() -> int:
    return sum(isinstance(thing, AnswerStream) for thing in gc.get_objects())


# Neither `pytest.raises` nor `asyncio.run` may see the error: both hold its frames themselves.
def read(stream: AnswerStream) -> str:
    try:
        stream.result()
    except OpsinError as error:
        return type(error).__name__
    return "none"


async def read_async(stream: AnswerStream) -> str:
    try:
        await stream.answer()
    except OpsinError as error:
        return type(error).__name__
    return "none"


def test_an_answer_that_failed_is_freed_at_once_also_without_garbage_collection() -> None:
    """A ring of error, frames, stream and images waits for a full collection: megabytes under load."""
    backend = FakeBackend(lambda _: "hello", limits=dataclasses.replace(LIMITS, n_ctx=8192, n_ctx_seq=8192))

    def ask_all(engine: Engine) -> None:
        for reading in (read, lambda stream: asyncio.run(read_async(stream))):
            stream = engine.submit(prompt(), SamplingParams(ignore_eos=True, guard=False, max_tokens=8000))
            stream.cancel()
            # The error is there for whoever reads again.
            assert [reading(stream), reading(stream)] == ["Cancelled"] * 2
            stream = engine.submit(prompt("x" * 9000))
            assert [reading(stream), reading(stream)] == ["ContextOverflow"] * 2

    with Engine(lambda: backend) as engine:
        gc.collect()
        before = streams_alive()
        gc.disable()
        try:
            ask_all(engine)
            for _ in range(4):  # whoever worked on the others has put them down then
                engine.submit(prompt()).result()
            assert streams_alive() <= before + 1
        finally:
            gc.enable()


def test_a_dead_engine_holds_nobody_who_asks_it() -> None:
    backend = FakeBackend(lambda _: "hello", limits=LIMITS)
    with Engine(lambda: backend) as engine:
        error = EngineDied("It died.")
        engine._loop.error = error
        for _ in range(2):
            with pytest.raises(EngineDied, match=r"It died\."):
                engine.submit(prompt())
        assert error.__traceback__ is None
        engine._loop.error = None


def test_a_reader_whose_event_loop_was_closed_hurts_nobody() -> None:
    backend = FakeBackend(
        lambda p: "x" * 50_000 if "long" in p else "short",
        limits=dataclasses.replace(LIMITS, n_ctx=1 << 16, n_ctx_seq=1 << 16),
    )

    async def first(events: AsyncIterator[Event]) -> Event:
        return await anext(events)

    with Engine(lambda: backend, max_tokens=60_000) as engine:
        stream = engine.submit(prompt("long"), SamplingParams(guard=False))
        loop = asyncio.new_event_loop()
        events = stream.__aiter__()
        assert isinstance(loop.run_until_complete(first(events)), Progress)
        loop.close()  # without a word to the reader that waits in it
        with pytest.raises(Cancelled):
            list(stream)
        assert engine.submit(prompt("quick")).result().text == "short"
        assert engine.stats.running == 0
        # Who asks to cancel such an answer hears nothing of it either.
        quick = engine.submit(prompt("quick"))
        quick.reader = (loop, asyncio.Event())
        quick.cancel()
        assert engine.submit(prompt("quick")).result().text == "short"
    assert engine._room._value == engine._most


def test_a_request_costs_little_of_our_own() -> None:
    """Python's share of a token, in CPU time: 2,000 tokens through plan, run and absorb, without any model."""
    backend = FakeBackend(lambda _: "x" * 4000, limits=dataclasses.replace(LIMITS, n_ctx=1 << 16, n_ctx_seq=1 << 16))
    backend.next_token = lambda row: ord("x")  # type: ignore[method-assign]
    with Engine(lambda: backend, max_tokens=2000) as engine:
        start = time.process_time()
        engine.submit(prompt(), SamplingParams(guard=False)).result()
        per_token = (time.process_time() - start) / 2000
    print(f"{per_token * 1e6:.0f} µs a token")
    assert per_token < 1e-3


def test_eos_is_no_text() -> None:
    assert EOS not in ask(FakeBackend(lambda _: "ab")).tokens


def test_a_known_image_is_neither_preprocessed_nor_encoded_again() -> None:
    backend = FakeBackend(lambda _: "fine")
    with Engine(lambda: backend, now=backend.clock) as engine:
        first = engine.submit(prompt("one")).result()
        second = engine.submit(prompt("two")).result()
    assert (first.images[0].cached, second.images[0].cached) == (False, True)
    assert len(backend.encoded) == 1
    assert first.stages.preprocess_ms == pytest.approx(3.0)
    assert (second.stages.preprocess_ms, second.stages.encode_ms, second.stages.image_prefill_ms) == (0.0, 0.0, 0.0)
    assert second.usage.cached_tokens == 1 + 4


def test_one_that_relied_on_anothers_encode_gets_its_own_when_that_one_fails() -> None:
    """Two ask about one image at once: the second has no pixels, and the encode that was to serve it fails."""
    backend = FakeBackend(lambda text: str(text.count("<")))
    prepared = threading.Semaphore(0)
    tokenize, encode = backend.tokenize, backend.encode

    def tokenizes(*args, **options):  # type: ignore[no-untyped-def]
        tokenized = tokenize(*args, **options)
        prepared.release()
        return tokenized

    def fails(run, between=None):  # type: ignore[no-untyped-def]
        for _prompt in range(2):
            assert prepared.acquire(timeout=10)
        backend.encode = encode  # type: ignore[method-assign]
        raise EncodeFailed("boom")

    backend.tokenize, backend.encode = tokenizes, fails  # type: ignore[method-assign]
    with Engine(lambda: backend, policy=Policy(parallel=2)) as engine:
        first, second = engine.submit(prompt("one")), engine.submit(prompt("two"))
        with pytest.raises(EncodeFailed):
            first.result()
        assert second.result().text == "4"
    assert len(backend.encoded) == 1
    assert backend.open_handles == 0


def test_an_image_known_on_disk_is_read_beside_the_engines_thread() -> None:
    """A disk read on the engine's thread made every stream wait for it."""
    readers = []

    class Disk:
        def get(self, identity: str) -> "Embedding | None":
            readers.append(threading.current_thread().name)
            return np.zeros((4, 4), np.float32)

        def put(self, identity: str, embedding: Embedding) -> None: ...
        def close(self) -> None: ...

    backend = FakeBackend(lambda text: str(text.count("<")))
    with Engine(lambda: backend, images=EmbeddingCache(0, Disk())) as engine:
        assert engine.submit(prompt("one")).result().text == "4"
    assert not backend.encoded
    assert readers
    assert not any("opsin-engine" in name for name in readers)


def test_pixels_of_32_requests_are_given_back_as_each_is_encoded() -> None:
    """With images of 12 megapixels all 32 together would be a gigabyte."""

    class Rgb(mmap.mmap):
        """Like the pixels that a worker maps, and countable."""

    held: weakref.WeakSet[Rgb] = weakref.WeakSet()
    surplus: list[int] = []

    class Backend(FakeBackend):
        def decode(self, rows: TokenBatch | EmbeddingRows, *, may_stop: bool = False) -> bool:
            surplus.append(len(held) + len(self.encoded) - 32)
            return super().decode(rows, may_stop=may_stop)

    def asked(seed: int) -> Prompt:
        rgb = Rgb(-1, 4096)
        held.add(rgb)
        return Prompt((ImagePart(dataclasses.replace(image(seed), rgb=rgb)), TextPart("what?" + TURN_TEXT)))

    limits = dataclasses.replace(LIMITS, n_ctx=16384, n_ctx_seq=16384, n_seq_max=32)
    backend = Backend(lambda _: "x" * 400, limits=limits)
    with Engine(lambda: backend, policy=Policy(parallel=32)) as engine:
        prompts = [asked(seed) for seed in range(32)]
        streams = [engine.submit(prompts.pop()) for _ in range(32)]
        for stream in streams:
            assert any(isinstance(event, TextDelta) for event in stream)
        assert not held
    assert max(surplus) <= 8  # at most one batch of encodes is not yet given back


def test_an_engine_that_cannot_attach_says_so_instead_of_hanging() -> None:
    class Broken(FakeBackend):
        @property
        def eog_tokens(self) -> frozenset[int]:
            raise RuntimeError("no vocabulary")

    backend = Broken()
    with pytest.raises(RuntimeError, match="no vocabulary"):
        Engine(lambda: backend)
    assert backend.closed


def test_an_image_that_attends_both_ways_and_does_not_fit_a_batch_is_refused_before_its_encode() -> None:
    class Both(FakeBackend):
        def tokenize(self, parts, *, add_bos, known=None):  # type: ignore[no-untyped-def]
            tokenized = super().tokenize(parts, add_bos=add_bos, known=known)
            runs = [dataclasses.replace(r, causal=False) if isinstance(r, ImageChunk) else r for r in tokenized.chunks]
            tokenized.chunks = tuple(runs)
            return tokenized

    backend = Both(image_tokens=65)
    with Engine(lambda: backend) as engine, pytest.raises(ContextOverflow, match="--ubatch 65"):
        engine.submit(prompt("one")).result()
    assert not backend.encoded
