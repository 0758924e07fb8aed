"""The worker process: an engine, a thread that reads messages, and a thread that sends what happened."""

import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opsin.compose import Runtime, end_with_parent, open_runtime
from opsin.core.answer import Finished, TextDelta
from opsin.core.backend import Backend
from opsin.core.errors import BadImage, DecodeFailed, EncodeFailed, EngineDied, ModelUnreadable, OpsinError
from opsin.core.model_info import HOST, Placement
from opsin.core.request import Image, ImageChunk, ImagePart, Prompt, SamplingParams
from opsin.engine import AnswerStream, Engine, wake_readers
from opsin.prompt import Message
from opsin.worker.messages import ENDING, Channel, Loaded, Packed, pack, portable, take_pixels

log = logging.getLogger(__name__)

_EDGE = 336  # pixels, of an image that is cut into tiles of a size of their own
_LOOK_SECONDS = 1.0  # how often a worker with nothing to read looks whether its engine still lives
# What streams that have begun say within so long goes out together: a write to each client costs more than a token of
# a small model, and nobody tells 50 pieces a second apart. A first text and an end go out at once.
_GATHER_SECONDS = 0.02


def main(*, notice: Callable[[], str | None] = lambda: None, open_model: Callable[..., Runtime] = open_runtime) -> None:
    """Serve the process that started this one until it is gone or says `close`; never returns.

    The arguments of the command are the socket's file descriptor and the parent's process id. `notice` gives the
    sentence of `Loaded`; `open_model` replaces how a model is opened, for tests.
    """
    fd, parent = map(int, sys.argv[1:3])
    # Whoever stops a service sends SIGTERM to all of its processes, but running answers end when the front says so.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    _Worker(Channel(socket.socket(fileno=fd)), notice, open_model).run()


class _Worker:
    """Three threads: `run` reads messages and never computes, the engine computes, one sends what happened.

    It ends with `os._exit`: an orderly end of the interpreter would wait for threads that may be loading a model.
    """

    def __init__(self, channel: Channel, notice: Callable[[], str | None], open_model: Callable[..., Runtime]) -> None:
        self._channel = channel
        self._notice = notice
        self._open_model = open_model
        self._runtime: Runtime | None = None
        self._watch = CallWatch(lambda images, change: channel.send(("images", images, change)))
        self._numbers: dict[AnswerStream, int] = {}
        self._speaking: set[AnswerStream] = set()  # those of which text was sent
        self._touched: set[AnswerStream] = set()
        self._touching = threading.Lock()
        self._waiting, self._urgent = threading.Event(), threading.Event()
        threading.Thread(target=self._send_events, name="opsin-events", daemon=True).start()

    def run(self) -> None:
        """Read messages; never returns. This thread answers whatever the engine does."""
        while True:
            try:
                message = self._channel.receive(_LOOK_SECONDS)
                if message is not None:
                    getattr(self, f"_on_{message[0]}")(*message[1:])
                    del message  # it may hold the pixels of a whole request
            except (EOFError, ConnectionError):
                os._exit(0)  # the front is gone, and nobody is left to tell
            except BaseException:
                log.exception("the worker failed on a message")
                os._exit(EngineDied.exit_code)
            if self._runtime is not None and isinstance(self._runtime.engine.error, EngineDied):
                os._exit(EngineDied.exit_code)

    def _on_open(self, options: dict[str, Any]) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        logging.getLogger("opsin").setLevel(logging.DEBUG if options["settings"].verbose else logging.INFO)
        # llama.cpp's own log has its own handler where --verbose asks for it.
        logging.getLogger("opsin.native").propagate = False
        threading.Thread(target=self._load, args=(options,), name="opsin-load", daemon=True).start()

    def _on_submit(
        self, number: int, prompt: Prompt, params: SamplingParams, options: dict[str, Any], *fds: int
    ) -> None:
        engine = self._engine
        take_pixels(prompt.images, fds)
        try:
            stream = engine.submit(prompt, params, **options)
        except OpsinError as error:
            self._channel.send(("events", [(number, [pack(error)])], engine.stats))
            return
        self._numbers[stream] = number
        self._wake((stream,))  # for what came before

    def _on_expect(self) -> None:
        self._engine.expect()

    def _on_cancel(self, number: int) -> None:
        for stream in [one for one, known in list(self._numbers.items()) if known == number]:
            stream.cancel()

    def _on_ping(self) -> None:
        self._channel.send(("pong", self._watch.running, self._watch.longest, self._engine.stats))

    def _on_close(self) -> None:
        self._engine.close()
        os._exit(0)

    @property
    def _engine(self) -> Engine:
        assert self._runtime is not None, "the front asks when the model is loaded"
        return self._runtime.engine

    def _wake(self, streams: Sequence[AnswerStream]) -> None:
        """These streams got events: called by the engine once a step, and by whoever ends a stream."""
        followed = [stream for stream in streams if stream in self._numbers]
        if len(followed) < len(streams):
            wake_readers([stream for stream in streams if stream not in self._numbers])  # the warm-up is read here
        with self._touching:
            self._touched.update(followed)
        if not self._urgent.is_set() and any(one.done or one not in self._speaking for one in followed):
            self._urgent.set()
        if followed and not self._waiting.is_set():
            self._waiting.set()

    def _send_events(self) -> None:
        """Send all that has happened in one message, with the counters."""
        sent_at = 0.0
        while True:
            self._waiting.wait()
            if (left := sent_at + _GATHER_SECONDS - time.monotonic()) > 0:
                self._urgent.wait(left)
            self._waiting.clear()
            self._urgent.clear()
            with self._touching:
                touched, self._touched = self._touched, set()
            if batch := self._take(touched):
                sent_at = time.monotonic()
                with contextlib.suppress(OSError):  # the front is gone: the thread that reads ends this process
                    self._channel.send(("events", batch, self._engine.stats))

    def _take(self, touched: set[AnswerStream]) -> list[Packed]:
        batch: list[Packed] = []
        for stream in touched:
            number = self._numbers.get(stream)
            if number is None:
                continue
            events, error = stream.take()
            happened = events if error is None else [*events, error]
            if not happened:
                continue
            batch.append((number, [pack(one) for one in happened]))
            if isinstance(happened[-1], (Finished, BaseException)):
                self._speaking.discard(stream)
                del self._numbers[stream]
            elif any(isinstance(event, TextDelta) for event in events):
                self._speaking.add(stream)
        return batch

    def _load(self, options: dict[str, Any]) -> None:
        """Load the model and say what it is, or why it cannot be used."""
        try:
            runtime = self._open_model(
                **options,
                trial=False,  # a crash ends this process alone
                watch=self._watch,
                wake=self._wake,
                resolved=lambda *files: self._channel.send(("loading", files)),
                progress=lambda share: self._channel.send(("progress", share)),
            )
            self._channel.send(("warming",))
            placement = _warm_up(runtime)
            gc.freeze()  # as in the front
            loaded = Loaded(
                info=runtime.engine.info,
                limits=runtime.engine.limits,
                source=runtime.prompts.source,
                is_demo=runtime.is_demo,
                setup=runtime.setup,
                load_ms=runtime.engine.load_ms,
                placement=placement,
                notice=self._notice(),
            )
            self._runtime = runtime
            self._channel.send(("ready", loaded, self._watch.longest, runtime.engine.stats))
        except BaseException as error:
            if not isinstance(error, OpsinError):
                log.exception("the model could not be loaded")
            with contextlib.suppress(OSError):
                self._channel.send(("failed", portable(error)))
            os._exit(getattr(error, "exit_code", EngineDied.exit_code))


def _warm_up(runtime: Runtime) -> Placement:
    """An encode past all caches proves where the encoder runs; a few tokens bring weights into memory.

    On a GPU that encode is another encoder's, so one of the largest image follows, for which all buffers are made.

    Raises ModelUnreadable: what is computed here is ours, so the files are at fault.
    """
    info = runtime.engine.info
    try:
        placement = runtime.engine.placement()
        if next(iter(placement.encoder), HOST) != HOST:
            try:
                encode_largest(runtime.engine)
            except EncodeFailed as error:  # smaller ones may fit
                log.warning("An image of the most tokens cannot be encoded: give --image-max-tokens. %s", error)
        params = SamplingParams(max_tokens=4, ignore_eos=True, guard=False, logprobs=2)
        hello = runtime.prompts.build([Message("user", "Hello.")])
        likely = runtime.engine.submit(hello, params, salt="warm-up").result().logprobs
    except (BadImage, DecodeFailed, EncodeFailed) as error:
        raise ModelUnreadable(f"{info.llm_file} with {info.mmproj_file} cannot be used. {error}") from error
    if {True} == {len(one.top) > 1 and one.top[0][2] == one.top[1][2] for one in likely}:
        raise ModelUnreadable(f"{info.llm_file} takes every token for as likely: its weights are damaged.")
    return placement


def encode_largest(engine: Engine) -> None:
    """Encode an image with as many tokens as one can have, past all caches. Raises EncodeFailed."""
    sizes = engine.limits.images
    edge = sizes.edge or sizes.cell * math.isqrt(sizes.most) or _EDGE
    black = ImagePart(Image(bytes(3 * edge**2), edge, edge, "", "PNG"))

    def encode(backend: Backend) -> None:
        with contextlib.closing(backend.tokenize([black], add_bos=False)) as tokenized:
            for chunk in tokenized.chunks:
                if isinstance(chunk, ImageChunk):
                    backend.encode(chunk)

    engine.call(encode)


class CallWatch:
    """Tells which images enter (+1) and leave (-1) native code, and how long the current calls have run, in seconds."""

    def __init__(self, tell: Callable[[tuple[str, ...], int], None]) -> None:
        self._tell = tell
        self._calls: dict[int, list[float]] = {}  # by thread: the begin of each nested call
        self.longest = 0.0
        """The longest call that came back."""

    @contextlib.contextmanager
    def __call__(self, images: tuple[str, ...]) -> Iterator[None]:
        """See `opsin.engine.Watch`."""
        calls = self._calls.setdefault(threading.get_ident(), [])
        if images:
            self._tell(images, +1)
        calls.append(time.perf_counter())
        try:
            yield
        finally:
            now = time.perf_counter()
            self.longest = max(self.longest, now - calls.pop())
            if calls:
                calls[-1] = now  # the outer one made progress
            if images:
                self._tell(images, -1)

    @property
    def running(self) -> float:
        """How long the call that has run longest was seen to do nothing else."""
        now = time.perf_counter()
        return max((now - calls[-1] for calls in list(self._calls.values()) if calls), default=0.0)
