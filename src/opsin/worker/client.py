"""The front's side of a worker: starts it, watches over it, starts it again; and offers what an engine offers.

One thread owns the worker's process for as long as the engine is open. Whoever waits for something may leave at any
time: the owner goes on, and the next one who asks finds what it has done.
"""

import dataclasses
import itertools
import logging
import operator
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opsin.core.answer import TextDelta
from opsin.core.backend import BackendLimits
from opsin.core.errors import BadInput, EngineClosed, EngineDied, EngineError, OpsinError, QueueFull, copy_of
from opsin.core.model_info import ModelInfo, Placement
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import EngineSettings
from opsin.engine import AnswerStream, Snapshot, wake_readers
from opsin.worker.messages import Child, Loaded, Packed, Pixels, share_all

log = logging.getLogger(__name__)

State = Literal["loading", "warming", "ready", "stalled", "restarting", "unloaded", "reloading", "failed", "closed"]

# -P: nothing of the working folder is imported.
COMMAND = (sys.executable, "-P", "-c", "from opsin.worker.process import main; main()")
# A worker that crashed is started again after these seconds, doubled with each crash until one was healthy for so long.
FIRST_DELAY, LONGEST_DELAY, HEALTHY_SECONDS = 0.1, 30.0, 60.0
MOST_STARTS = 5  # workers in a row that never became ready
PING_SECONDS = 1.0
# One that says nothing for so long while somebody waits is shown as stalled, and then ended.
STALLED_SECONDS, SILENT_SECONDS = 5.0, 20.0
# A native call is endless when it takes so many times as long as the longest that came back, and at least so long; it
# is shown as stalled after that share of the time.
LEAST_CALL_SECONDS, CALL_FACTOR, STALLED_SHARE = 60.0, 10.0, 0.4
CRASHES_TO_BLOCK, BLOCKED_SECONDS = 2, 3600.0
_NOW = frozenset({"running", "waiting", "idle_prefixes", "cells_used"})  # true now; all else of a snapshot counts


class NotReady(EngineError, http_status=503):
    """The model is not loaded yet, or about to be closed; `retry_after` is in seconds."""

    retry_after = 2


class ImageBlocked(BadInput, http_status=422):
    """The model's process crashed twice while it worked on this image."""


@dataclass(slots=True)
class _Request:
    """One request until its stream ends; `prompt` is None once the worker has it."""

    stream: AnswerStream
    prompt: Prompt | None
    params: SamplingParams
    options: dict[str, Any]
    asked: float


class Ready:
    """What is known once the model is loaded: each of these waits for the first loading."""

    wait_ready: Callable[[], Loaded]

    @property
    def info(self) -> ModelInfo:
        """Names of the loaded pair."""
        return self.wait_ready().info

    @property
    def limits(self) -> BackendLimits:
        """Sizes of the loaded pair."""
        return self.wait_ready().limits

    @property
    def load_ms(self) -> float:
        """Milliseconds that loading took."""
        return self.wait_ready().load_ms

    def placement(self) -> Placement:
        """Where encoder and language model ran in the warm-up."""
        return self.wait_ready().placement


class WorkerEngine(Ready):
    """An engine in a process of its own, started at once.

    `model`, `mmproj`, `settings` and `max_queue` are those of `compose.open_runtime`. The worker is ready when it has
    proved its placement and generated a few tokens. After `idle_seconds` without a request it is ended, which gives all
    memory back; the next request starts it again and waits for it. `changed` is called with each new state, in the
    owner's thread. `command` starts the worker. `crashes` is kept together with other workers: when each image crashed.

    `loaded` is the model, also while it is unloaded, and None before it was loaded for the first time; `error` says why
    nothing can be asked any more; `restarts` counts workers that crashed or hung and were replaced; `pid` is the
    worker's process, None while there is none; `progress` is how much of the language model was loaded, from 0 to 1.
    """

    def __init__(
        self,
        model: str | Path | None,
        mmproj: str | Path | None,
        settings: EngineSettings,
        *,
        max_queue: int = 256,
        idle_seconds: float | None = None,
        changed: Callable[[State], object] = lambda _: None,
        command: Sequence[str] = COMMAND,
        crashes: dict[str, list[float]] | None = None,
    ) -> None:
        self._open = ("open", {"model": model, "mmproj": mmproj, "settings": settings, "max_queue": max_queue})
        self._command = command
        self.slots = settings.parallel
        self._most = settings.parallel + max_queue
        self._idle_seconds = idle_seconds
        self._tick = PING_SECONDS if idle_seconds is None else min(PING_SECONDS, idle_seconds / 4)
        self._changed = changed
        self._condition = threading.Condition(threading.RLock())
        self._numbers = itertools.count()
        self._requests: dict[int, _Request] = {}
        # When an image was in native code as a worker crashed; images that merely waited are not blamed.
        self._crashes = {} if crashes is None else crashes
        self._child: Child | None = None
        self.pid: int | None = None
        self._closing = self._woken = False
        self._state: State = "loading"
        self.progress = 0.0
        self.loaded: Loaded | None = None
        self.error: OpsinError | None = None
        self.restarts = 0
        self._before, self._latest = Snapshot(), Snapshot()
        self._used = time.monotonic()
        self._silent = self._call_seconds = self._longest = 0.0
        self._failures = 0  # starts in a row without a ready worker
        self._owner = threading.Thread(target=self._own, name="opsin-worker", daemon=True)
        self._owner.start()

    @property
    def state(self) -> State:
        """What the worker is doing. It is `unloaded` when it was idle, and `failed` when it cannot be started."""
        stalled = self._silent >= STALLED_SECONDS or self._call_seconds > STALLED_SHARE * self._call_limit
        return "stalled" if self._state == "ready" and stalled else self._state

    @property
    def stats(self) -> Snapshot:
        """Counters over all workers so far, and what is so now."""
        with self._condition:  # a worker that ends moves its counts from one to the other
            return Snapshot(*map(operator.add, dataclasses.astuple(self._before), dataclasses.astuple(self._latest)))

    @property
    def in_flight(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def wait_ready(self) -> Loaded:
        """Wait until the model was loaded. Raises the error with which that failed, or EngineClosed."""
        with self._condition:
            self._condition.wait_for(lambda: self.loaded is not None or self.error is not None)
            if self.loaded is None:
                assert self.error is not None
                raise copy_of(self.error)
            return self.loaded

    def wake(self, *, low: bool = False) -> None:
        """A request is about to come: start an unloaded worker, or let work of low priority wait, unless it is `low`.

        The loading goes on if it does not come.
        """
        with self._condition:
            if self._state == "ready" and self._child is not None and not low:
                self._child.post(("expect",))
            self._used = time.monotonic()
            self._woken = self._state == "unloaded"
            self._condition.notify_all()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        load_ms: float = 0.0,
        queue_ms: float = 0.0,
        waited_since: float | None = None,
        priority: int = 0,
        salt: str = "",
        count_only: bool = False,
    ) -> AnswerStream:
        """See `Engine.submit`. A request waits for a worker that was idle or has crashed once, with its `load_ms`.

        Raises NotReady, ImageBlocked, QueueFull, EngineClosed, or why the worker cannot be started.
        """
        for image in prompt.images:
            crashes = self._crashes.get(image.sha256, [])
            if len(crashes) >= CRASHES_TO_BLOCK and time.monotonic() - crashes[-1] < BLOCKED_SECONDS:
                raise ImageBlocked(
                    "The model's process crashed twice while it worked on an image of this request, so the image is "
                    "refused for an hour: send another one, or the same one in another size."
                )
        number = next(self._numbers)
        stream = AnswerStream(lambda: None)
        stream.on_end = lambda: self._ended(number, stream)
        options: dict[str, Any] = {"load_ms": load_ms, "queue_ms": queue_ms, "waited_since": waited_since}
        options |= {"priority": priority, "salt": salt, "count_only": count_only}
        request = _Request(stream, share_all(prompt), params or SamplingParams(), options, time.perf_counter())
        with self._condition:
            if self.error is not None:
                raise copy_of(self.error)
            if self.loaded is None or self._failures:
                raise NotReady("The model is being loaded: ask again in a moment (GET /ready says when).")
            if len(self._requests) >= self._most:  # while it is loaded again, the engine cannot say so
                raise QueueFull(f"{self._most} requests are running or waiting already: try again in a moment.")
            self._requests[number] = request
            if self._state == "ready" and self._child is not None:
                self._hand_over(self._child, number, request)
            self._condition.notify_all()
        return stream

    def close(self) -> None:
        """End the worker: running answers fail with EngineClosed. Twice does no harm."""
        with self._condition:
            self._closing = True
            self.error = self.error or EngineClosed("The engine is closed: open a new one.")
            if self._child is not None:
                self._child.end()
            self._fail_all(EngineClosed("The engine was closed before the answer was complete."))
            self._condition.notify_all()
        self._owner.join()

    def _hand_over(self, child: Child, number: int, request: _Request) -> None:
        assert request.prompt is not None, "a request is handed over once"
        shared = [image.rgb for image in request.prompt.images if isinstance(image.rgb, Pixels)]
        child.post(("submit", number, request.prompt, request.params, request.options), shared)
        request.prompt = None  # its pixels are the worker's from now on

    def _ended(self, number: int, stream: AnswerStream) -> None:
        """A stream is over; the worker does not know yet when it is its reader who has left."""
        self._requests.pop(number, None)
        self._used = time.monotonic()
        child = self._child
        if stream.cancelled and child is not None:
            child.post(("cancel", number))

    def _fail_all(self, error: OpsinError, *, sent: bool = False) -> None:
        """End all requests, or those that a worker had been sent."""
        for request in list(self._requests.values()):
            if request.prompt is None or not sent:
                request.stream.fail(copy_of(error))

    # Everything below runs in the owner's thread.

    def _set(self, state: State) -> None:
        with self._condition:
            self._state = state
            self._condition.notify_all()
        self._changed(state)

    def _own(self) -> None:
        """Start one worker after another until none is needed any more."""
        delay = FIRST_DELAY
        try:
            while self._wait_for_work():
                child = Child(self._command, self._open)
                with self._condition:
                    self._child, self.pid = child, child.pid
                    self._silent = self._call_seconds = 0.0
                    if self._closing:
                        child.end()
                try:
                    self._watch(child)
                finally:
                    code = child.reap()
                if self._after(child, code):
                    healthy = child.ready_at is not None and time.monotonic() - child.ready_at >= HEALTHY_SECONDS
                    delay = FIRST_DELAY if healthy else delay
                    log.error("the worker %s; it is started again in %g s", child.reason, delay)
                    with self._condition:
                        self._condition.wait_for(lambda: self._closing, delay)
                    delay = min(delay * 2, LONGEST_DELAY)
        except BaseException as error:
            log.exception("the thread that owns the worker failed")
            self.error = EngineDied(f"The worker's owner failed ({type(error).__name__}: {error}): open a new engine.")
            self._fail_all(self.error)
        self._set("closed" if self._closing else "failed")

    def _wait_for_work(self) -> bool:
        """Wait while nobody needs a worker; False when none is needed any more."""
        with self._condition:
            if self._state == "unloaded":
                self._condition.wait_for(lambda: self._closing or self._woken or self._requests)
            self._woken = False
            if self._closing or self.error is not None:
                return False
            if self._state == "unloaded":
                self._set("reloading")
            return True

    def _watch(self, child: Child) -> None:
        """Read what a worker says until it is gone."""
        while True:
            try:
                message = child.channel.receive(self._tick)
            except EOFError:
                return
            quiet = message is None and child.ready_at is not None
            waits = quiet and self._requests
            # Not by the clock: the front itself may have been stopped.
            self._silent = self._silent + self._tick if waits else 0.0
            if message is not None:
                getattr(self, f"_on_{message[0]}")(child, *message[1:])
            elif waits or (quiet and self._latest.running):  # whose clients left: the count is from before their end
                child.post(("ping",))
            self._tend(child)

    def _tend(self, child: Child) -> None:
        """End a worker that hangs, and one that nobody has needed for long."""
        now = time.monotonic()
        if child.kill_at is not None and now >= child.kill_at:
            child.kill("did not end and was killed")
        elif self._silent > SILENT_SECONDS:
            child.kill(f"did not answer for {self._silent:.0f} s and was killed")
        elif self._call_seconds > self._call_limit:
            child.kill(f"was killed, {self._call_seconds:.0f} s into one native call")
        elif self._idle_seconds is not None and child.ready_at is not None and child.kill_at is None:
            with self._condition:
                if not self._requests and now - self._used >= self._idle_seconds:
                    child.end()
                    self._set("unloaded")
                    log.info("model unloaded: nobody asked for a while; the next request loads it again")

    @property
    def _call_limit(self) -> float:
        return max(LEAST_CALL_SECONDS, CALL_FACTOR * self._longest)

    def _after(self, child: Child, code: int) -> bool:
        """Settle what a worker leaves behind; whether it crashed and another one is to be started."""
        with self._condition:
            self._child = self.pid = None
            self._before, self._latest = dataclasses.replace(self.stats, **dict.fromkeys(_NOW, 0)), Snapshot()
            if self._closing or child.kill_at is not None:
                return False
            died = EngineDied("The model's process ended before the answer was complete: ask again in a moment.")
            self._fail_all(died, sent=True)
            if child.error is None:
                now = time.monotonic()
                for image in +child.images:
                    recent = [at for at in self._crashes.get(image, ()) if now - at < BLOCKED_SECONDS]
                    self._crashes[image] = [*recent, now]
            elif self._state == "reloading":
                self._fail_all(child.error)  # the next request tries again
                self._set("unloaded")
                return False
            self._failures = self._failures + 1 if child.ready_at is None else 0
            if child.error is not None or self.loaded is None:
                self.error = child.error or child.load_error(code)
            elif self._failures >= MOST_STARTS:
                self.error = died
            if self.error is not None:
                self._fail_all(self.error)
                return False
            self.restarts += 1
            self._set("restarting")
            return True

    def _on_loading(self, child: Child, files: Sequence[Path | None]) -> None:
        child.files = " with ".join(str(file) for file in files if file is not None)

    def _on_progress(self, _child: Child, share: float) -> None:
        self.progress = share

    def _on_warming(self, _child: Child) -> None:
        if self._state == "loading":
            self._set("warming")

    def _on_failed(self, child: Child, error: OpsinError) -> None:
        child.error = error

    def _on_ready(self, child: Child, loaded: Loaded, longest: float, stats: Snapshot) -> None:
        with self._condition:
            child.ready_at = self._used = time.monotonic()
            self.loaded, self._longest, self._latest, self._failures = loaded, longest, stats, 0
            now = time.perf_counter()
            for number, request in self._requests.items():
                request.options["load_ms"] += (now - request.asked) * 1e3
                self._hand_over(child, number, request)
            self._set("ready")

    def _on_events(self, _child: Child, batch: list[Packed], stats: Snapshot) -> None:
        self._call_seconds = 0.0
        self._latest = stats
        touched: list[AnswerStream] = []
        for number, events in batch:
            request = self._requests.get(number)
            if request is None:
                continue  # its client has left
            stream = request.stream
            touched.append(stream)
            for event in events:
                if isinstance(event, BaseException):
                    stream.fail(event)
                else:
                    stream.add(TextDelta(event) if isinstance(event, str) else event)
        wake_readers(touched)

    def _on_images(self, child: Child, images: Sequence[str], change: int) -> None:
        self._call_seconds = 0.0
        child.images.update(dict.fromkeys(images, change))

    def _on_pong(self, _child: Child, running: float, longest: float, stats: Snapshot) -> None:
        self._call_seconds, self._longest, self._latest = running, longest, stats
