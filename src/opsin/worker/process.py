"""The worker process: an engine, a thread that reads messages, and a thread that sends what happened."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Finished, Started
from opsin.core.errors import EngineDied, OpsinError
from opsin.core.placement import Placement
from opsin.core.request import Prompt, SamplingParams
from opsin.engine import AnswerStream, wake_readers
from opsin.native.parent import end_with_parent
from opsin.prompt import Message
from opsin.worker.messages import Channel, Loaded, Packed, Pixels, pack, portable, set_pixels

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often a worker with nothing to read looks whether its engine still lives."""
_STATS_SECONDS = 0.25
"""How old counters may be while tokens flow."""

Open = Callable[..., Runtime]


def main(*, notice: Callable[[], str | None] = lambda: None, open_model: Open = open_runtime) -> None:
    """Serve the process that started this one until it is gone or says `close`; never returns.

    The arguments of the command are the socket's file descriptor and the parent's process id. `notice` gives the
    sentence of `Loaded`; `open_model` replaces how a model is opened, for tests.
    """
    fd, parent = map(int, sys.argv[1:3])
    # Whoever stops a service sends SIGTERM to all of its processes, but running answers end when the front says so.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    _Worker(Channel(sock), notice, open_model).run()


class _Worker:
    def __init__(self, channel: Channel, notice: Callable[[], str | None], open_model: Open) -> None:
        self._channel = channel
        self._notice = notice
        self._open_model = open_model
        self._runtime: Runtime | None = None
        self._watch = CallWatch(lambda images, change: channel.send(("images", images, change)))
        self._outbox = _Outbox(channel, lambda: None if self._runtime is None else self._runtime.engine.stats)
        self._pixels: dict[int, dict[int, Pixels]] = {}  # by request and place

    def run(self) -> None:
        """Read messages; this thread never computes, so it answers whatever the engine does."""
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
                _leave(EngineDied.exit_code)
            if self._runtime is not None and isinstance(self._runtime.engine.error, EngineDied):
                self._outbox.flush()
                _leave(EngineDied.exit_code)

    def _on_open(self, options: dict[str, Any]) -> None:
        _log_to_stderr(verbose=options["settings"].verbose)
        threading.Thread(target=self._load, args=(options,), name="opsin-load", daemon=True).start()

    def _on_pixels(self, number: int, index: int, size: int, fd: int) -> None:
        self._pixels.setdefault(number, {})[index] = Pixels(fd, size)

    def _on_submit(self, number: int, prompt: Prompt, params: SamplingParams, options: dict[str, Any]) -> None:
        assert self._runtime is not None, "the front submits when the model is loaded"
        for index, pixels in self._pixels.pop(number, {}).items():
            set_pixels(prompt.images[index], pixels)
        try:
            stream = self._runtime.engine.submit(prompt, params, **options)
        except OpsinError as error:
            self._outbox.refuse(number, error)
            return
        self._outbox.follow(number, stream)

    def _on_cancel(self, number: int) -> None:
        self._outbox.cancel(number)

    def _on_ping(self) -> None:
        self._channel.send(("pong", self._watch.running, self._watch.longest, self._outbox.stats()))

    def _on_close(self) -> None:
        def close() -> None:
            if self._runtime is not None:
                self._runtime.close()
            _leave(0)

        threading.Thread(target=close, name="opsin-close", daemon=True).start()

    def _load(self, options: dict[str, Any]) -> None:
        """Load the model and say what it is, or why it cannot be used."""
        try:
            runtime = self._open_model(
                **options,
                trial=False,  # a crash ends this process alone
                watch=self._watch,
                wake=self._outbox.wake,
                resolved=lambda *files: self._channel.send(("loading", files)),
            )
            self._channel.send(("warming",))
            placement = _warm_up(runtime)
            assert runtime.template is not None, "a runtime of a model knows its template"
            loaded = Loaded(
                info=runtime.engine.info,
                limits=runtime.engine.limits,
                source=runtime.template,
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
            _leave(getattr(error, "exit_code", EngineDied.exit_code))


def _warm_up(runtime: Runtime) -> Placement:
    """Encode an image and generate a few tokens, so that weights are in memory and graphs are built.

    The encode is the one that proves where the encoder runs: it goes past the caches, so it is a real one at every
    start, and nothing of it is remembered.
    """
    placement = runtime.engine.placement()
    prompt = runtime.prompts.build([Message("user", "Hello.")])
    params = SamplingParams(max_tokens=4, ignore_eos=True, guard=False)
    runtime.engine.submit(prompt, params, salt="warm-up").result()
    return placement


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


class _Outbox:
    """Sends what happens to requests: one message for all that an engine step brought."""

    def __init__(self, channel: Channel, stats: Callable[[], Any]) -> None:
        self._channel = channel
        self.stats = stats
        self._numbers: dict[AnswerStream, int] = {}
        self._streams: dict[int, AnswerStream] = {}
        self._woken: queue.SimpleQueue[Sequence[AnswerStream] | Packed] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._stats_at = 0.0
        threading.Thread(target=self._run, name="opsin-events", daemon=True).start()

    def wake(self, streams: Sequence[AnswerStream]) -> None:
        """These streams got events: called by the engine once a step."""
        self._woken.put(streams)
        wake_readers([stream for stream in streams if stream not in self._numbers])  # the warm-up is read here

    def follow(self, number: int, stream: AnswerStream) -> None:
        """Send the events of this stream from now on."""
        self._streams[number], self._numbers[stream] = stream, number
        self._woken.put((stream,))  # for what came before

    def refuse(self, number: int, error: OpsinError) -> None:
        """Send that the request failed before it began."""
        self._woken.put(pack(number, error))

    def cancel(self, number: int) -> None:
        """End an answer that nobody waits for any more."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.cancel()

    def flush(self) -> None:
        """Send what is there now."""
        with self._sending:
            self._send([])

    def _run(self) -> None:
        while True:
            first = self._woken.get()
            with self._sending:
                self._send([first])

    def _send(self, woken: list[Sequence[AnswerStream] | Packed]) -> None:
        while not self._woken.empty():
            woken.append(self._woken.get())
        batch: list[Packed] = []
        milestone = False  # counters travel with what changes them visibly, not with every token
        for one in woken:
            if isinstance(one[0], int):
                batch.append(cast("Packed", one))
                continue
            for stream in cast("Sequence[AnswerStream]", one):
                number = self._numbers.get(stream)
                if number is not None:
                    milestone |= self._take(number, stream, batch)
        now = time.monotonic()
        if milestone or now - self._stats_at >= _STATS_SECONDS:
            self._stats_at, stats = now, self.stats()
        else:
            stats = None
        if batch:
            with contextlib.suppress(OSError):  # the front is gone: the message thread ends this process
                self._channel.send(("events", batch, stats))

    def _take(self, number: int, stream: AnswerStream, batch: list[Packed]) -> bool:
        """Put a stream's events into the batch; whether the request began or ended."""
        events, error = stream.take()
        batch += [pack(number, event) for event in events]
        if error is not None:
            batch.append(pack(number, error))
        ended = error is not None or any(isinstance(event, Finished) for event in events)
        if ended:
            del self._streams[number], self._numbers[stream]
        return ended or any(isinstance(event, Started) for event in events)


def _leave(code: int) -> None:
    """End now: an orderly end of the interpreter would wait for threads that may be loading a model."""
    sys.stderr.flush()
    os._exit(code)


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("opsin").setLevel(logging.DEBUG if verbose else logging.INFO)
    # llama.cpp's own log has its own handler where --verbose asks for it.
    logging.getLogger("opsin.native").propagate = False
